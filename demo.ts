// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Two concurrent tasks share one `LazyConnection`, and have two connections:
 *
 * ```sh
 * deno run --allow-net demo.ts            # a server of its own, on loopback
 * deno run --allow-net demo.ts HOST PORT  # any HTTP server
 * ```
 *
 * @module
 */
import { LazyConnection } from "./mod.ts";

/** Sends the recipe's request in two tasks at once, and logs what they do. */
export async function demo(
  hostname: string,
  port: number,
  log: (line: string) => void,
): Promise<void> {
  await using lazy = new LazyConnection({ hostname, port });
  const bothOpen = Promise.withResolvers<void>();
  let open = 0;

  async function fetchIndex(name: string) {
    const signal = AbortSignal.timeout(10_000); // milliseconds
    await using conn = await lazy.connect({ signal });
    const { hostname, port } = conn.localAddr;
    log(`${name}: connected from ${hostname}:${port}`);
    if (++open === 2) {
      log("both connections are open");
      bothOpen.resolve();
    }
    await bothOpen.promise;
    await sendRequest();
    const response = await new Response(conn.readable).bytes();
    log(`${name}: Got ${response.length} bytes`);
  }

  /** Needs no parameter: it finds the connection of the task that calls it. */
  async function sendRequest() {
    const request = `GET /index.html HTTP/1.0\r\nHost: ${hostname}\r\n\r\n`;
    await lazy.current?.write(new TextEncoder().encode(request));
  }

  await Promise.all([
    lazy.run(fetchIndex, "task 1"),
    lazy.run(fetchIndex, "task 2"),
  ]);
}

/** Runs the demo as the command line says. */
export async function main(
  args: string[],
  log: (line: string) => void,
): Promise<void> {
  if (args.length === 0) {
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      () => new Response("<h1>Hello from the demo's own server</h1>\n"),
    );
    return await demo(server.addr.hostname, server.addr.port, log);
  }
  const [hostname, port, ...rest] = args;
  if (!hostname || !port || rest.length > 0) {
    throw new TypeError("Cannot run the demo: give HOST and PORT, or nothing");
  }
  if (!/^\d{1,5}$/.test(port) || Number(port) < 1 || Number(port) > 65_535) {
    throw new RangeError(
      `Cannot connect to port "${port}": a port is a number from 1 to 65535`,
    );
  }
  try {
    await demo(hostname, Number(port), log);
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
