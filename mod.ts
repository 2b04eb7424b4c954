// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * One shared object that gives each async task (an HTTP request, say) its own
 * connection or transaction, without passing it through every function.
 *
 * - A *task* is a call of `run()`, with everything that it starts. Its first
 *   `get()` opens the connection, and every later one gives the same.
 * - Throw to roll back. A response that is returned commits, whatever its
 *   status. A time-out goes inside, `lazy.run(() => deadline(fn(), 1_000))`.
 * - `run()` inside a task is independent: it takes a connection of its own.
 * - `runOrJoin()` takes part in the current task, or starts one. If its
 *   function throws, the whole task rolls back, even if the caller catches the
 *   error.
 * - Nothing that outlives the task can use its connection. Only a call that has
 *   begun goes on, and what the client has given, such as a prepared statement,
 *   is not guarded. So wait for all branches before you throw or return.
 * - Retry the whole `run()`.
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
 *       // Settles as the task does
 *       await lend({ query: (sql) => void log.push(sql) });
 *       log.push("COMMIT");
 *     } catch (error) {
 *       log.push("ROLLBACK");
 *       throw error;
 *     } finally {
 *       log.push("close");
 *     }
 *   },
 * );
 *
 * async function insert(value: number) {
 *   const client = await lazy.get(); // this task's own, however deep the call
 *   client.query(`INSERT ${value}`);
 *   if (value < 0) throw new RangeError("negative");
 * }
 *
 * await lazy.run(insert, 1);
 * assertEquals(log.splice(0), ["BEGIN", "INSERT 1", "COMMIT", "close"]);
 *
 * await lazy.run(insert, -1).catch(() => {});
 * assertEquals(log, ["BEGIN", "INSERT -1", "ROLLBACK", "close"]);
 * ```
 *
 * @module
 */
export * from "./lazy_connection.ts";
