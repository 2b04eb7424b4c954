// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * A connection, or a transaction, for each asynchronous task, from one shared
 * object: what `threading.local()` does for threads, done for tasks with
 * `AsyncLocalStorage`.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals } from "@std/assert";
 *
 * await using server = Deno.serve(
 *   { hostname: "127.0.0.1", port: 0 },
 *   () => new Response("Hello"),
 * );
 * await using lazy = new LazyConnection({ port: server.addr.port });
 *
 * async function fetchIndex() {
 *   const conn = await lazy.get(); // this task's own connection
 *   await conn.write(new TextEncoder().encode("GET / HTTP/1.0\r\n\r\n"));
 *   return await new Response(conn.readable).text();
 * } // closed when the task ends
 *
 * // Two tasks, two connections
 * const [a, b] = await Promise.all([lazy.run(fetchIndex), lazy.run(fetchIndex)]);
 * assertEquals(a.slice(-5), "Hello");
 * assertEquals(b.slice(-5), "Hello");
 * ```
 *
 * @module
 */
export * from "./lazy_connection.ts";
