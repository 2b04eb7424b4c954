// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * One object that many asynchronous tasks share, and that gives each of them a
 * connection of its own: a socket, or a database client in a transaction.
 *
 * - `run(fn)` wraps a function that needs the connection. Functions that call
 *   each other are one transaction.
 * - `runNew(fn)` begins a task: a request, a job, a timer, an item of a queue.
 * - `get()` gives the task's connection, and opens it the first time.
 * - Throw to roll back, and await all that you start.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals } from "@std/assert";
 *
 * const log: string[] = [];
 * const lazy = new LazyConnection<{ query(sql: string): void }>(
 *   async (lend) => {
 *     log.push("BEGIN");
 *     try {
 *       await lend({ query: (sql) => void log.push(sql) }); // until the task ends
 *       log.push("COMMIT");
 *     } catch (error) {
 *       log.push("ROLLBACK");
 *       throw error;
 *     }
 *   },
 * );
 *
 * const add = (amount: number) =>
 *   lazy.run(async () => {
 *     const client = await lazy.get(); // the task's own
 *     client.query(`ADD ${amount}`);
 *     if (amount > 100) throw new RangeError("Cannot add so much");
 *   });
 * const transfer = (amount: number) =>
 *   lazy.run(async () => {
 *     await add(-amount);
 *     await add(amount);
 *   });
 *
 * await transfer(1);
 * assertEquals(log.splice(0), ["BEGIN", "ADD -1", "ADD 1", "COMMIT"]);
 * await transfer(200).catch(() => {});
 * assertEquals(log, ["BEGIN", "ADD -200", "ADD 200", "ROLLBACK"]);
 * ```
 *
 * The README has the rules, and what was tried with servers (`Deno.serve`, Hono,
 * Express, Fastify), database clients, and recipes.
 *
 * @module
 */
export * from "./lazy_connection.ts";
