// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Shows what a `LazyConnection` does for tasks, first of all that two at once
 * have a socket each:
 *
 * ```sh
 * deno run --allow-net demo.ts            # its own server, on loopback
 * deno run --allow-net demo.ts HOST PORT  # the sockets alone, any HTTP server
 * ```
 *
 * @module
 */
import { LazyConnection } from "./mod.ts";

type Log = (line: string) => void;

/** The recipe: two tasks at once send a request, each over its own socket. */
async function fetchTwice(hostname: string, port: number, log: Log) {
  await using lazy = new LazyConnection({ hostname, port });
  const bothOpen = Promise.withResolvers<void>();
  let open = 0;

  async function fetchIndex(name: string) {
    const signal = AbortSignal.timeout(10_000); // milliseconds
    using conn = await lazy.connect({ signal });
    const local = conn.localAddr;
    log(`${name}: connected from ${local.hostname}:${local.port}`);
    if (++open === 2) bothOpen.resolve();
    await bothOpen.promise;
    await sendRequest();
    const response = await new Response(conn.readable).bytes();
    log(`${name}: got ${response.length} bytes`);
  }

  /** Needs no parameter: it gets the socket of the task that calls it. */
  async function sendRequest() {
    const conn = await lazy.get();
    const request = `GET /index.html HTTP/1.0\r\nHost: ${hostname}\r\n\r\n`;
    await conn.write(new TextEncoder().encode(request));
  }

  await Promise.all([
    lazy.runNew(fetchIndex, "task 1"),
    lazy.runNew(fetchIndex, "task 2"),
  ]);
}

/** A second `connect()` in a task, and one that its signal cancels. */
async function refuseAndCancel(hostname: string, port: number, log: Log) {
  await using lazy = new LazyConnection({ hostname, port });
  const controller = new AbortController();
  const { signal } = controller;
  await lazy.runNew(async () => {
    const first = lazy.connect({ signal });
    await lazy.connect().catch((error) =>
      log(`a second connect() in a task is refused: ${error.name}`)
    );
    controller.abort();
    await first.catch((error) =>
      log(`a connect() whose signal aborts is cancelled: ${error.name}`)
    );
  });
}

/** What is stored by tasks of two functions, over a database of a few lines. */
async function commitAndRollBack(log: Log) {
  const stored: string[] = [];
  await using lazy = new LazyConnection<string[]>(async (lend) => {
    const rows: string[] = [];
    await lend(rows); // rejects if the task fails
    stored.push(...rows);
  });

  const insert = (row: string) =>
    lazy.run(async () => {
      const rows = await lazy.get();
      rows.push(row);
    });
  const debit = () => insert("debit");
  const credit = (works: boolean) =>
    lazy.run(async () => {
      await insert("credit");
      if (!works) throw new Error("no such account");
    });
  const transfer = (works: boolean) =>
    lazy.run(async () => {
      await debit();
      await credit(works);
    });
  const report = (what: string) =>
    log(`${what}: ${stored.splice(0).join(" and ") || "nothing"} stored`);

  await transfer(true);
  report("a task of two functions commits");
  await transfer(false).catch(() => {});
  report("a task whose second function fails rolls back");
  const audited = lazy.runNew(async () => {
    await lazy.runNew(insert, "audit");
    await transfer(false);
  });
  await audited.catch(() => {});
  report("a runNew() inside a task that fails is kept");
}

/** Runs the demo as the command line says. */
export async function main(args: string[], log: Log): Promise<void> {
  if (args.length === 0) {
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      () => new Response("<h1>Hello from the demo's own server</h1>\n"),
    );
    const { hostname, port } = server.addr;
    await fetchTwice(hostname, port, log);
    await refuseAndCancel(hostname, port, log);
    return await commitAndRollBack(log);
  }
  const [hostname, port, ...rest] = args;
  if (!hostname || !port || rest.length > 0) {
    throw new TypeError("Cannot run the demo: give HOST and PORT, or nothing");
  }
  try {
    await fetchTwice(hostname, Number(port), log);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : cause;
    throw new Error(`Cannot fetch from ${hostname}:${port}: ${why}`, { cause });
  }
}

if (import.meta.main) {
  try {
    await main(Deno.args, console.log);
  } catch (error) {
    console.error(error instanceof Error ? error.message : error);
    Deno.exit(1);
  }
}
