// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Two concurrent tasks share one `LazyConnection`, and have two connections:
 *
 * ```sh
 * deno run --allow-net demo.ts            # its own server, on loopback
 * deno run --allow-net demo.ts HOST PORT  # any HTTP server
 * ```
 *
 * @module
 */
import { LazyConnection } from "./mod.ts";

type Log = (line: string) => void;

/** Sends the recipe's request in two tasks at once, and logs what they do. */
async function fetchTwice(hostname: string, port: number, log: Log) {
  await using lazy = new LazyConnection({ hostname, port });
  const bothOpen = Promise.withResolvers<void>();
  let open = 0;

  async function fetchIndex(name: string) {
    const signal = AbortSignal.timeout(10_000); // milliseconds
    using conn = await lazy.connect({ signal });
    const local = conn.localAddr;
    log(`${name}: connected from ${local.hostname}:${local.port}`);
    if (++open === 2) {
      log("both connections are open");
      bothOpen.resolve();
    }
    await bothOpen.promise;
    await sendRequest();
    const response = await new Response(conn.readable).bytes();
    log(`${name}: Got ${response.length} bytes`);
  }

  /** Needs no parameter: it gets the connection of the task that calls it. */
  async function sendRequest() {
    const conn = await lazy.get();
    const request = `GET /index.html HTTP/1.0\r\nHost: ${hostname}\r\n\r\n`;
    await conn.write(new TextEncoder().encode(request));
  }

  await Promise.all([
    lazy.run(fetchIndex, "task 1"),
    lazy.run(fetchIndex, "task 2"),
  ]);
}

/** Logs a second `connect()` in a task, and one that its signal cancels. */
async function refuseAndCancel(hostname: string, port: number, log: Log) {
  await using lazy = new LazyConnection({ hostname, port });
  const controller = new AbortController();
  const first = lazy.connect(controller);
  const second = lazy.connect();
  controller.abort();
  await second.catch((error) =>
    log(`a second connect() in a task: ${error.name}`)
  );
  await first.catch((error) =>
    log(`a connect() that its signal cancels: ${error.name}`)
  );
}

/** Logs what an opener does with a transaction as its task ends. */
async function commitAndRollBack(log: Log) {
  type Client = { query(sql: string): void };
  const sent: string[] = [];
  await using lazy = new LazyConnection<Client>(async (lend) => {
    const client = { query: (sql: string) => void sent.push(sql) };
    client.query("BEGIN");
    try {
      await lend(client);
    } catch (error) {
      client.query("ROLLBACK");
      throw error;
    }
    client.query("COMMIT");
  });

  async function insert(error?: Error) {
    const client = await lazy.get();
    client.query("INSERT");
    if (error) throw error;
  }

  await lazy.run(insert);
  log(`a task that succeeds: ${sent.splice(0).join(", ")}`);
  await lazy.run(insert, new Error("no")).catch(() => {});
  log(`a task that fails: ${sent.splice(0).join(", ")}`);
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
