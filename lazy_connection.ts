// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";

const { AlreadyExists, BadResource, Busy, NotConnected } = Deno.errors;
const BOTH = "Cannot end the task: it failed, and so did its opener";
const CONNECTED = "Cannot connect: the task has a socket or is opening one, " +
  "dispose of it or start another task with run()";
const DISPOSED = "Cannot use the LazyConnection: it has been disposed of";
const LENT = "Cannot lend: the opener has lent already, retry around run()";
const LENT_TO_ANOTHER = "Cannot lend: another task has this connection";
const NO_BLOCK = "Cannot connect: a block cannot tell the opener whether it " +
  "succeeded, call get()";
const NO_DISPOSAL = "Cannot dispose of the connection: its opener closes it " +
  "when the task ends, use an inner run() to end earlier";
const NO_OBJECT = "Cannot lend: the connection must be an object, and no " +
  "promise";
const NO_TASK = "Cannot get a connection: there is no task, call run() first";
const NOT_LENT = "Cannot get a connection: its opener is over, and has lent " +
  "none, it must `await lend(connection)`";
const OVER = "Cannot use the connection: its opener was over before the " +
  "task, it must `await lend(connection)`";
const PENDING = "Cannot end the task: a part of it is pending, await each " +
  "runOrJoin()";

/**
 * Opens a connection, lends it to the task that asked for it, and closes it.
 *
 * `await lend(connection)` takes as long as the task has the connection. It
 * resolves if the task succeeded, and rejects with the task's error if it
 * failed. So an opener commits after it, rolls back in a `catch`, which throws
 * the error again, and closes in a `finally`. The task itself does none of
 * these. Any `db.transaction(callback)`-style function works as an opener.
 *
 * The opener is called inside the task, once for each attempt to connect. If it
 * fails before it lends, the attempt rejects with its error. If it fails later,
 * the task does. It must not be over before `lend()` is, and must not wait for
 * its own `LazyConnection`, which would wait for ever.
 *
 * The task gets a *stand-in* for the connection: a `Proxy`, which works like
 * the connection until the task ends. After that, reading from it, writing to
 * it and calling it throw a `Deno.errors.BadResource`, so that nobody writes
 * into somebody else's transaction. Even an asynchronous method throws then,
 * before it returns a promise.
 *
 * - What a property, a method or a callback gives, such as a prepared
 *   statement, is no stand-in, and a call that has begun goes on.
 * - A stream that is piped into a stand-in throws in its listener once the task
 *   has ended.
 * - A function that needs the very object, such as `backup()` of `node:sqlite`,
 *   refuses a stand-in. For that, lend `Object.freeze({ client })`, of which
 *   the stand-in gives `client` as it is.
 * - A method that the task patches must be put back before the task ends.
 *
 * @example A transaction for each task
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals, assertRejects } from "@std/assert";
 *
 * type Client = { query(sql: string): void };
 * const log: string[] = [];
 * const lazy = new LazyConnection<Client>(async (lend) => {
 *   const client = { query: (sql: string) => void log.push(sql) };
 *   try {
 *     client.query("BEGIN");
 *     await lend(client);
 *     client.query("COMMIT");
 *   } catch (error) {
 *     client.query("ROLLBACK");
 *     throw error;
 *   } finally {
 *     log.push("closed");
 *   }
 * });
 *
 * async function insert(value: number) {
 *   const client = await lazy.get();
 *   client.query(`INSERT ${value}`);
 *   if (value < 0) throw new RangeError("Cannot insert a negative value");
 * }
 *
 * await lazy.run(insert, 1);
 * assertEquals(log.splice(0), ["BEGIN", "INSERT 1", "COMMIT", "closed"]);
 *
 * await assertRejects(() => lazy.run(insert, -1), RangeError);
 * assertEquals(log, ["BEGIN", "INSERT -1", "ROLLBACK", "closed"]);
 * ```
 *
 * @example Options for a task
 *
 * The opener is called inside the task, so it sees what an `AsyncLocalStorage`
 * of yours holds around `run()`. An inner `run()` inherits that.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals } from "@std/assert";
 * import { AsyncLocalStorage } from "node:async_hooks";
 *
 * const log: string[] = [];
 * const modes = new AsyncLocalStorage<"READ ONLY" | "READ WRITE">();
 * const lazy = new LazyConnection<{ query(sql: string): void }>(
 *   async (lend) => {
 *     log.push(`BEGIN ${modes.getStore() ?? "READ WRITE"}`);
 *     await lend({ query: (sql) => void log.push(sql) }); // and so on, as above
 *   },
 * );
 *
 * await modes.run("READ ONLY", () => lazy.run(() => lazy.get()));
 * await lazy.run(() => lazy.get());
 * assertEquals(log, ["BEGIN READ ONLY", "BEGIN READ WRITE"]);
 * ```
 *
 * @example A savepoint
 *
 * A task inside a task, over the outer task's connection. If it fails, only
 * what it did is rolled back. Savepoints of one task wait for each other; what
 * the outer task itself sends meanwhile is rolled back with them.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals } from "@std/assert";
 * import { AsyncLocalStorage } from "node:async_hooks";
 *
 * type Client = { query(sql: string): void };
 * const log: string[] = [];
 * const open = () => ({ query: (sql: string) => void log.push(sql) });
 *
 * const outers = new AsyncLocalStorage<Client | undefined>();
 * let savepoints = 0;
 * const lazy = new LazyConnection<Client>(async (lend) => {
 *   const outer = outers.getStore();
 *   const client = outer ?? open();
 *   const name = `s${++savepoints}`;
 *   client.query(outer ? `SAVEPOINT ${name}` : "BEGIN");
 *   try {
 *     await lend(client);
 *     client.query(outer ? `RELEASE ${name}` : "COMMIT");
 *   } catch (error) {
 *     client.query(outer ? `ROLLBACK TO ${name}` : "ROLLBACK");
 *     throw error;
 *   }
 * });
 *
 * const last = new WeakMap<Client, Promise<unknown>>();
 * async function savepoint<T>(fn: () => Promise<T>): Promise<T> {
 *   const outer = await lazy.get();
 *   const task = async () => {
 *     await lazy.get(); // from the opener, which sees the outer connection
 *     return await outers.run(undefined, fn); // a run() in the function does not
 *   };
 *   const next = Promise.allSettled([last.get(outer)])
 *     .then(() => outers.run(outer, () => lazy.run(task)));
 *   last.set(outer, next);
 *   return await next;
 * }
 *
 * async function insert(value: number) {
 *   const client = await lazy.get();
 *   client.query(`INSERT ${value}`);
 *   if (value < 0) throw new RangeError("negative");
 * }
 * await lazy.run(() =>
 *   Promise.allSettled([1, -1].map((value) => savepoint(() => insert(value))))
 * );
 * assertEquals(log, [
 *   ...["BEGIN", "SAVEPOINT s2", "INSERT 1", "RELEASE s2"],
 *   ...["SAVEPOINT s3", "INSERT -1", "ROLLBACK TO s3", "COMMIT"],
 * ]);
 * ```
 *
 * @example A test that rolls back
 *
 * All tasks get the same client, one after the other, each in a savepoint.
 * Where `lazy` is a constant that modules share, give it the opener for
 * savepoints, which is shown above, and call `outers.run(client, test)`.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertEquals } from "@std/assert";
 *
 * type Client = { query(sql: string): void };
 * async function addUser(lazy: LazyConnection<Client>) {
 *   const client = await lazy.get();
 *   client.query("INSERT");
 * }
 *
 * Deno.test("addUser() inserts", async () => {
 *   const log: string[] = [];
 *   const client = { query: (sql: string) => void log.push(sql) };
 *   const lazy = new LazyConnection<Client>(async (lend) => {
 *     client.query("SAVEPOINT s");
 *     try {
 *       await lend(client);
 *       client.query("RELEASE s");
 *     } catch (error) {
 *       client.query("ROLLBACK TO s");
 *       throw error;
 *     }
 *   });
 *   client.query("BEGIN");
 *   try {
 *     await lazy.run(addUser, lazy);
 *   } finally {
 *     client.query("ROLLBACK");
 *   }
 *   assertEquals(
 *     log,
 *     ["BEGIN", "SAVEPOINT s", "INSERT", "RELEASE s", "ROLLBACK"],
 *   );
 * });
 * ```
 *
 * @example A Unix socket
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const path = "/run/redis/redis-server.sock";
 * const lazy = new LazyConnection<Deno.UnixConn>(async (lend) => {
 *   using conn = await Deno.connect({ transport: "unix", path });
 *   await lend(conn);
 * });
 * ```
 *
 * @example TLS
 *
 * With the handshake in the opener, a wrong certificate rejects the attempt.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const lazy = new LazyConnection<Deno.TlsConn>(async (lend) => {
 *   using conn = await Deno.connectTls({ hostname: "example.com", port: 443 });
 *   await conn.handshake();
 *   await lend(conn);
 * });
 * ```
 *
 * @typeParam C The type of the connection.
 * @param lend Lends the connection. It never throws. It rejects with a
 * `Deno.errors.Busy` if the same `LazyConnection` has lent the connection to
 * another task, and with a `TypeError` if the connection is not an object, or
 * is a promise; then nothing is lent. If it is called again after it has lent,
 * it rejects with a `TypeError`, whose `cause` is the task's error, if any.
 * @param signal Aborts when the attempt is cancelled, and never once the
 * connection is lent. A cancelled attempt rejects at once. Nobody hears of what
 * its opener does after that, but disposal waits for it.
 * @returns A promise that settles when the connection is closed.
 */
export type Opener<C extends object> = (
  lend: (connection: C) => Promise<void>,
  signal: AbortSignal,
) => PromiseLike<void>;

/**
 * One object for many tasks, each of which has a connection of its own.
 *
 * A *task* is a call of `run()`, with everything that it starts. Its first
 * `get()` has an *opener* open a connection and *lend* it to the task. When the
 * task ends, the opener learns whether it succeeded, and closes the connection.
 *
 * A `LazyConnection` that is made from the options of `Deno.connect` opens
 * sockets. These may also be opened for a block, by `connect()`, and closed
 * early: disposing of a socket closes it, and the task may open another.
 *
 * @example Two tasks, two connections
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertNotEquals } from "@std/assert";
 *
 * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * await using lazy = new LazyConnection({ port: server.addr.port });
 *
 * async function localPort() {
 *   const conn = await lazy.get(); // this task's own connection
 *   return conn.localAddr.port;
 * }
 *
 * const [a, b] = await Promise.all([lazy.run(localPort), lazy.run(localPort)]);
 * assertNotEquals(a, b);
 * ```
 *
 * @typeParam C The type of the connection.
 */
export class LazyConnection<C extends object = Deno.TcpConn>
  implements AsyncDisposable {
  readonly #opener: Opener<C>;
  /** Whether it is made from options, and lends sockets as they are. */
  readonly #sockets: boolean = false;
  /** The signal of the options. */
  readonly #signal: AbortSignal | undefined;
  readonly #tasks = new AsyncLocalStorage<Task>();
  /** Stands for all code outside of `run()`. It never ends. */
  readonly #outside = new Task();
  /** The loans whose openers are not over. */
  readonly #loans = new Set<Loan>();
  /** The connections that are lent; none may be lent twice at once. */
  readonly #lent = new Set<object>();
  /** Why everything is refused, once it is disposed of. */
  #disposed: Error | undefined;

  /**
   * Creates a `LazyConnection`. It opens nothing yet, so it needs no
   * permission.
   *
   * @example From the options of `Deno.connect`
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   *
   * const lazy = new LazyConnection({ hostname: "example.com", port: 80 });
   * ```
   *
   * @example From an opener
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   *
   * const lazy = new LazyConnection<Deno.FsFile>(async (lend) => {
   *   using file = await Deno.open("data.csv");
   *   await lend(file);
   * });
   * ```
   *
   * @param target What to connect to: the options of `Deno.connect`, or an
   * opener. The `signal` of the options cancels every attempt to connect, but
   * closes no socket that a task has.
   */
  constructor(
    target: Opener<C> | (Deno.TcpConn extends C ? Deno.ConnectOptions : never),
  ) {
    if (typeof target === "function") {
      this.#opener = target;
      return;
    }
    this.#sockets = true;
    const { signal, ...options }: Deno.ConnectOptions = target;
    this.#signal = signal;
    this.#opener = async (lend, signal) => {
      const { loan } = this.#task; // the one that this call is for
      // Deno.connect() calls this last. If it threw, a socket that opened just
      // as the signal aborted would be lost; lend() rejects instead.
      signal.throwIfAborted = () => {};
      const conn = await Deno.connect({ ...options, signal });
      const { [Symbol.dispose]: close } = conn;
      conn[Symbol.dispose] = () => {
        close.call(conn);
        loan?.end();
      };
      try {
        await lend(conn as object as C); // so says the type of `target`
      } finally { // `using` would take 0.25 µs more (deno task ratios)
        conn[Symbol.dispose]();
      }
    };
  }

  /** The current task. */
  get #task(): Task {
    return this.#tasks.getStore() ?? this.#outside;
  }

  /**
   * The task's connection, or `undefined` if it has none yet.
   *
   * It opens nothing: a task that has not asked for its connection has none. So
   * `lazy.current ?? pool` would bypass the transaction of such a task; see
   * `get()` for what to do instead.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertStrictEquals } from "@std/assert";
   *
   * const lazy = new LazyConnection<Date>((lend) => lend(new Date()));
   *
   * await lazy.run(async () => {
   *   assertEquals(lazy.current, undefined);
   *   const date = await lazy.get();
   *   assertStrictEquals(lazy.current, date);
   * });
   * ```
   *
   * @returns The connection, or `undefined`.
   */
  get current(): C | undefined {
    return this.#task.loan?.connection as C | undefined; // nothing but a C is lent
  }

  /**
   * Calls a function as a task of its own, with a connection of its own.
   *
   * When the function's promise settles, the task ends. An opener that has lent
   * to it then commits or rolls back, and `run()` waits for that. If the opener
   * fails, such as by a refused COMMIT, so does `run()`. An attempt to connect
   * that is still going on is cancelled.
   *
   * To roll back, throw. A function that returns succeeds, whatever it returns.
   * A time-out goes inside: `lazy.run(() => deadline(fn(), 1_000))`. Around
   * `run()`, it would reject, but the task would go on and commit.
   *
   * Nothing that outlives the task can use its connection. Only a call that has
   * begun goes on, so wait for all branches before you throw or return. What
   * works off a queue that tasks share belongs to the task that has started it:
   * there, call `run()` for each item.
   *
   * A `run()` inside a task starts an independent task: it commits or rolls
   * back by itself, whatever becomes of the outer one. It needs a second
   * connection: on a pool that is used up, it waits for one.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * const lazy = new LazyConnection<Date>((lend) => lend(new Date(0)));
   *
   * async function addYears(years: number): Promise<number> {
   *   const date = await lazy.get();
   *   return date.getUTCFullYear() + years;
   * }
   *
   * assertEquals(await lazy.run(addYears, 1), 1971);
   * ```
   *
   * @example An error that becomes a response
   *
   * It is translated outside of `run()`. Inside, a response that is returned
   * commits, whatever its status.
   *
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * class Conflict extends Error {}
   * const lazy = new LazyConnection<Date>((lend) => lend(new Date()));
   *
   * async function respond(handle: () => Promise<Response>): Promise<Response> {
   *   try {
   *     return await lazy.run(handle);
   *   } catch (error) {
   *     if (!(error instanceof Conflict)) throw error;
   *     return new Response(error.message, { status: 409 });
   *   }
   * }
   *
   * const response = await respond(() => Promise.reject(new Conflict("taken")));
   * assertEquals(response.status, 409);
   * ```
   *
   * @example Retry
   *
   * The whole task, where the database says that it may succeed the next time.
   * Do not retry after a lost connection: its COMMIT may have been stored.
   * What can be read only once, such as a request's body, is read before.
   *
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   * import { retry } from "@std/async/retry";
   *
   * let attempts = 0;
   * const lazy = new LazyConnection<{ query(): void }>((lend) =>
   *   lend({
   *     query() {
   *       if (++attempts === 1) throw Object.assign(new Error(), { code: "40001" });
   *     },
   *   })
   * );
   * async function transfer() {
   *   const client = await lazy.get();
   *   client.query();
   * }
   *
   * // PostgreSQL: serialization failure, deadlock. MySQL: errno 1213, 1205
   * const codes = ["40001", "40P01"];
   * await retry(() => lazy.run(transfer), {
   *   minTimeout: 10, // milliseconds
   *   isRetriable: (error: unknown) =>
   *     error instanceof Error && "code" in error &&
   *     codes.includes(String(error.code)),
   * });
   * assertEquals(attempts, 2);
   * ```
   *
   * @example After COMMIT
   *
   * Another `LazyConnection`, around the first, lends a list of functions, and
   * calls them if the task has succeeded. By then the task has committed, so
   * that what they fail with must not fail it.
   *
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * const log: string[] = [];
   * const lazy = new LazyConnection<{ query(sql: string): void }>(
   *   async (lend) => {
   *     await lend({ query: (sql) => void log.push(sql) }); // rejects, to roll back
   *     log.push("COMMIT");
   *   },
   * );
   * const afterCommit = new LazyConnection<(() => unknown)[]>(async (lend) => {
   *   const functions: (() => unknown)[] = [];
   *   await lend(functions);
   *   const results = await Promise.allSettled(functions.map(async (fn) => fn()));
   *   for (const result of results) {
   *     if (result.status === "rejected") console.error(result.reason);
   *   }
   * });
   *
   * async function addUser() {
   *   const client = await lazy.get();
   *   client.query("INSERT");
   *   const functions = await afterCommit.get();
   *   functions.push(() => log.push("send mail"));
   * }
   *
   * await afterCommit.run(() => lazy.run(addUser));
   * assertEquals(log, ["INSERT", "COMMIT", "send mail"]);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns, be it a promise.
   * @param callback The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {unknown} Whatever the function fails with, or the opener after it
   * has lent.
   * @throws {SuppressedError} If both fail, unless one error is the other's
   * `cause` or `suppressed`: `suppressed` is the function's error, `error` the
   * opener's.
   * @throws {Deno.errors.BadResource} If the `LazyConnection` has been disposed
   * of: before the call, and the function is not called; or later, while the
   * task had a connection.
   * @throws {TypeError} If a call of `runOrJoin()` in the task is still pending
   * when the function succeeds, or if the opener does not await `lend()`.
   */
  async run<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    if (this.#disposed) throw this.#disposed;
    const task = new Task();
    // A thenable, such as a query that runs once it is awaited, runs in the task
    const call = () => Promise.resolve(callback(...args));
    let result!: Awaited<R>; // read only if nothing failed
    let failure: Failure;
    try {
      result = await this.#tasks.run(task, call);
    } catch (error) {
      failure = { error };
    }
    const { loan } = task;
    failure = task.end(failure);
    if (loan?.returned) failure = both(failure, await loan.closed);
    if (failure) throw failure.error;
    return result;
  }

  /**
   * Calls a function as a part of the current task or, outside of any, as a
   * task of its own.
   *
   * It is for a function that needs a transaction, whether its caller has begun
   * one or not. If the function throws, the whole task rolls back, even if the
   * caller catches the error: half of the work must not be committed. For the
   * same reason, a task fails if it ends before a part of it has settled.
   *
   * In a task that has ended it calls nothing, and rejects. What outlives its
   * task, such as a timer that a request has started, uses `run()`.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * let opened = 0;
   * const lazy = new LazyConnection<{ id: number }>(
   *   (lend) => lend({ id: ++opened }),
   * );
   * const pay = (amount: number) =>
   *   lazy.runOrJoin(async () => {
   *     const { id } = await lazy.get();
   *     if (amount < 0) throw new RangeError("Cannot pay less than nothing");
   *     return id;
   *   });
   *
   * assertEquals(await pay(5), 1); // a task of its own
   * assertEquals(await lazy.run(() => Promise.all([pay(2), pay(3)])), [2, 2]);
   * await assertRejects(() => lazy.run(() => pay(-1).catch(() => 0)), RangeError);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns, be it a promise.
   * @param callback The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {unknown} Whatever the function fails with.
   * @throws {Deno.errors.BadResource} If the task has ended. Outside of a task,
   * this and what else `run()` throws.
   */
  async runOrJoin<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    const task = this.#tasks.getStore();
    if (!task) return await this.run(callback, ...args);
    if (task.ended) throw endedError("join");
    task.parts++;
    try {
      return await callback(...args);
    } catch (error) {
      task.failure = { error }; // the last one, which may translate an earlier one
      throw error;
    } finally {
      task.parts--;
    }
  }

  /**
   * Gets the task's connection: the one that it has, else the one that is being
   * opened, whoever began that, else a new one.
   *
   * All calls in a task, however deep and however many at once, get the same
   * connection, which the task keeps to its end.
   *
   * If the attempt fails or is cancelled, it fails for all who wait for it, and
   * the next call tries again. A time-out belongs in the opener or, for one
   * caller's wait alone, in `deadline` of `@std/async` around this promise. A
   * failed attempt that nobody awaits yet does not end the process.
   *
   * Outside of `run()` it opens nothing. It gives the socket that `connect()`
   * has opened there, or is opening.
   *
   * @example A server in which each request is a task
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * using database = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * await using lazy = new LazyConnection({ port: database.addr.port });
   *
   * async function query() {
   *   const conn = await lazy.get(); // this task's, without a parameter
   *   return conn.localAddr.port;
   * }
   *
   * async function handle() {
   *   const [a, b] = await Promise.all([query(), query()]);
   *   return new Response(a === b ? "one connection" : "two connections");
   * }
   *
   * await using server = Deno.serve(
   *   { hostname: "127.0.0.1", port: 0 },
   *   () => lazy.run(handle),
   * );
   * const response = await fetch(`http://127.0.0.1:${server.addr.port}`);
   * assertEquals(await response.text(), "one connection");
   * ```
   *
   * @example The task's transaction, or the pool where there is no task
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * const pool = { name: "pool" };
   * const lazy = new LazyConnection<{ name: string }>(
   *   (lend) => lend({ name: "transaction" }),
   * );
   *
   * async function name() {
   *   const db = await lazy.get().catch((error) => {
   *     if (error instanceof Deno.errors.NotConnected) return pool;
   *     throw error;
   *   });
   *   return db.name;
   * }
   *
   * assertEquals(await name(), "pool");
   * assertEquals(await lazy.run(name), "transaction");
   * ```
   *
   * @returns The connection: a stand-in for what an opener has lent, or the
   * socket itself.
   * @throws {unknown} Whatever the opener fails with, or `Deno.connect`.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {Deno.errors.Busy} If the opener lends another task's connection.
   * @throws {Deno.errors.NotConnected} Outside of `run()`, if `connect()` has
   * opened nothing there.
   * @throws {TypeError} If the opener is over without having lent a connection,
   * or before its task is over.
   */
  get(): Promise<C> {
    const task = this.#task;
    // After disposal, #connection() says so
    if (task === this.#outside && !task.loan && !this.#disposed) {
      return Promise.reject(new NotConnected(NO_TASK));
    }
    return this.#connection(task) as Promise<C>; // nothing but a C is lent
  }

  /**
   * Opens a socket for a block, inside or outside of `run()`. It is for a
   * `LazyConnection` that is made from the options of `Deno.connect`.
   *
   * Disposing of the socket, at the end of the block or by a call, closes it at
   * once, and the task may open another. Its `close()` closes it, too, but the
   * task keeps it: `get()` goes on giving the closed socket.
   *
   * What an opener lends is for `get()`: a disposer cannot tell whether its
   * block succeeded, so it could not commit.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: server.addr.port });
   * {
   *   using conn = await lazy.connect();
   *   assertEquals(conn.remoteAddr.port, server.addr.port);
   * } // closed here
   * assertEquals(lazy.current, undefined);
   * ```
   *
   * @example A time-out, in milliseconds
   * ```ts ignore
   * import { LazyConnection } from "@cookbook/lazy-connection";
   *
   * const lazy = new LazyConnection({ hostname: "example.com", port: 80 });
   * using conn = await lazy.connect({ signal: AbortSignal.timeout(5_000) });
   * ```
   *
   * @param options The options of this attempt.
   * @param options.signal Cancels the attempt, which then rejects at once with
   * the signal's `reason`. It has no effect once the socket is open.
   * @returns The socket.
   * @throws {unknown} Whatever `Deno.connect` fails with, or the signal's
   * `reason`.
   * @throws {Deno.errors.AlreadyExists} If the task has a socket, or is opening
   * one.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {TypeError} If the `LazyConnection` has an opener, or if `signal`
   * is invalid.
   */
  connect(
    this: LazyConnection<Deno.TcpConn>,
    { signal }: { signal?: AbortSignal | undefined } = {},
  ): Promise<Deno.TcpConn> {
    if (!this.#sockets) return Promise.reject(new TypeError(NO_BLOCK));
    const task = this.#task;
    if (task.loan && !this.#disposed) { // see get()
      return Promise.reject(new AlreadyExists(CONNECTED));
    }
    return this.#connection(task, signal) as Promise<Deno.TcpConn>;
  }

  /** The task's connection: the one that it has, or is opening, or a new one. */
  #connection(task: Task, signal = this.#signal): Promise<object> {
    const { loan } = task;
    if (task.ended) return rejected(endedError("connect"));
    if (loan?.failure) return rejected(loan.failure.error);
    if (loan) return loan.opened.promise;
    if (this.#disposed) return rejected(this.#disposed);
    const next = task.loan = new Loan(task);
    this.#loans.add(next);
    next.closed = this.#call(next, signal);
    return next.opened.promise;
  }

  /** Calls the opener, and resolves to what it fails with in closing. */
  async #call(loan: Loan, signal?: AbortSignal): Promise<Failure> {
    let cancel: AbortSignal | undefined;
    let failure: Failure;
    const abort = () => {
      if (loan.state === "opening") loan.end({ error: cancel?.reason });
    };
    try {
      // Not the given signal itself: an EventTarget searches all its listeners
      // whenever one is added or removed, and many attempts may share a signal.
      if (signal !== undefined) {
        cancel = AbortSignal.any([signal, this.#signal ?? signal]);
        cancel.throwIfAborted();
        cancel.addEventListener("abort", abort);
      }
      const lend = (connection: C) => this.#lend(loan, connection);
      const opener = this.#opener; // a function of its own, without `this`
      await opener(lend, loan.attempt.signal);
    } catch (error) {
      failure = { error };
    }
    cancel?.removeEventListener("abort", abort);
    this.#loans.delete(loan);
    loan.over = true;
    if (loan.state !== "ended") {
      failure ??= { error: new TypeError(loan.returned ? OVER : NOT_LENT) };
      loan.end(failure);
    } else if (loan.failure && loan.failure.error === failure?.error) {
      failure = undefined; // the opener only passes on what lend() rejected with
    }
    return failure;
  }

  #lend(loan: Loan, connection: C): Promise<void> {
    const { state, failure, returned } = loan;
    const again = failure && { cause: failure.error };
    if (returned) return rejected(new TypeError(LENT, again));
    if (state === "ended") return rejected(failure?.error);
    // A promise that resolves to a thenable would resolve to what that gives
    if (Object(connection) !== connection || "then" in connection) {
      return rejected(new TypeError(NO_OBJECT));
    }
    if (this.#sockets) return loan.lend(connection);
    if (this.#lent.has(connection)) return rejected(new Busy(LENT_TO_ANOTHER));
    this.#lent.add(connection);
    const end = loan.lend(standIn(connection, loan));
    const free = () => this.#lent.delete(connection);
    end.then(free, free); // before the opener goes on, which may hand it on
    return end;
  }

  /**
   * Takes every connection from its task, so that openers roll back and close,
   * cancels every attempt to connect, and refuses whatever comes later. It
   * waits for all openers, but not for tasks to end.
   *
   * A task that had a connection fails with a `Deno.errors.BadResource`, even
   * if its function succeeds: what was not committed is no success. If closing
   * fails, `run()` rejects with that as well.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertRejects } from "@std/assert";
   *
   * const lazy = new LazyConnection<Date>((lend) => lend(new Date()));
   *
   * const task = lazy.run(async () => {
   *   await lazy.get();
   *   await lazy[Symbol.asyncDispose]();
   * });
   * await assertRejects(() => task, Deno.errors.BadResource);
   * await assertRejects(() => lazy.run(() => {}), Deno.errors.BadResource);
   * ```
   *
   * @returns A promise that resolves once nothing is open. It never rejects.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    const error = this.#disposed ??= new BadResource(DISPOSED);
    for (const loan of this.#loans) loan.end({ error });
    // An opener that calls this is still to return, before its loan has `closed`
    await null;
    await Promise.all(Array.from(this.#loans, ({ closed }) => closed));
  }
}

/** A call of `run()`, or all code outside of any. */
class Task {
  ended = false;
  /** How many of its parts, the calls of `runOrJoin()` in it, are pending. */
  parts = 0;
  /** What a part failed with: half of the work must not be committed. */
  failure: Failure;
  /** Its attempt to connect, then its connection. */
  loan: Loan | undefined;

  /** Ends the task, and returns what it fails with. */
  end(failure: Failure): Failure {
    const { loan } = this;
    failure ??= this.failure ?? loan?.failure;
    if (this.parts > 0) failure ??= { error: new TypeError(PENDING) };
    this.ended = true;
    if (loan?.state === "opening") loan.end({ error: endedError("connect") });
    else loan?.end(failure);
    return failure;
  }
}

/**
 * A call of the opener: an attempt to connect, then a connection that is lent.
 *
 * It is not generic, and neither is `Task`: with a `C` that goes in and comes
 * out, a `LazyConnection<Deno.TcpConn>` would be no
 * `LazyConnection<Disposable>`.
 */
class Loan {
  state: "opening" | "lent" | "ended" = "opening";
  /** What the task has, as long as it has it: the stand-in, or the socket. */
  connection: object | undefined;
  /** Why it has ended, if not with the success of its task. */
  failure: Failure;
  /** What `get()` and `connect()` return. */
  readonly opened = Promise.withResolvers<object>();
  /** What `lend()` returns, once it has lent. */
  returned: PromiseWithResolvers<void> | undefined;
  /** Resolves when the opener is over, to what it failed with in closing. */
  closed: Promise<Failure> | undefined;
  /** Whether the opener is over. */
  over = false;
  /** Has the signal that the opener is called with. */
  readonly attempt = new AbortController();

  constructor(readonly task: Task) {}

  /** Lends what the task gets. The promise settles when the loan ends. */
  lend(connection: object): Promise<void> {
    this.state = "lent";
    this.connection = connection;
    this.opened.resolve(connection);
    this.returned = Promise.withResolvers<void>();
    return this.returned.promise;
  }

  /** Ends the loan, once: rejects the attempt, or settles what `lend()` returned. */
  end(failure?: Failure): void {
    const { state, task } = this;
    if (state === "ended") return;
    this.state = "ended";
    this.failure = failure;
    this.connection = undefined;
    // What is taken from a running task stays with it, so that it gets no other
    const isTaken = state === "lent" && failure && !task.ended;
    if (!isTaken) task.loan = undefined;
    if (state === "opening") {
      quiet(this.opened.promise);
      this.opened.reject(failure?.error);
      if (!this.over) this.attempt.abort(failure?.error);
    } else if (failure) this.returned!.reject(failure.error);
    else this.returned!.resolve();
  }

  /** Throws if the task does not have the connection any more. */
  check(): void {
    if (this.task.ended) throw endedError("use the connection");
    if (this.failure) throw this.failure.error;
  }
}

/** The connections' own functions, by the guarded ones that stand-ins give. */
const originals = new WeakMap<object, object>();

type Method = (...args: unknown[]) => unknown;

/** Makes what works as the connection does, as long as its task has it. */
function standIn(connection: object, loan: Loan): object {
  /** What the stand-in gives for functions of the connection. */
  const given = new WeakMap<object, object>();
  // On the connection itself, a method can use its private fields
  const unwrap = <T>(self: T) => self === proxy ? connection : self;

  /** Calls the connection, or a function that `guarded()` has made. */
  function apply(method: Method, self: object, args: unknown[]): unknown {
    // A patch that a task has left on the connection: this one has its own guard
    if (self === connection) return Reflect.apply(method, self, args);
    loan.check();
    const result = Reflect.apply(method, unwrap(self), args);
    return result === connection ? proxy : result;
  }

  function guarded(original: object): object {
    let method = given.get(original);
    if (!method) {
      method = new Proxy(original, { apply });
      given.set(original, method);
      originals.set(method, original);
    }
    return method;
  }

  function get(_: object, key: PropertyKey, receiver: object): unknown {
    if (key === Symbol.dispose || key === Symbol.asyncDispose) {
      throw new TypeError(NO_DISPOSAL);
    }
    // A promise that resolves to it asks for the one, console.log for the other
    if (key !== "then" && key !== Symbol.toStringTag) loan.check();
    const value: unknown = Reflect.get(connection, key, unwrap(receiver));
    const isMethod = typeof value === "function" && key !== "constructor";
    if (!isMethod && value !== connection) return value;
    const own = Reflect.getOwnPropertyDescriptor(connection, key);
    if (own?.writable === false && !own.configurable) return value; // must be
    return value === connection ? proxy : guarded(value);
  }

  function set(_: object, key: PropertyKey, value: unknown, receiver: object) {
    loan.check();
    return Reflect.set(connection, key, toStore(key, value), unwrap(receiver));
  }

  function defineProperty(_: object, key: PropertyKey, to: PropertyDescriptor) {
    loan.check();
    const own = "value" in to ? { ...to, value: toStore(key, to.value) } : to;
    return Reflect.defineProperty(connection, key, own);
  }

  /** What the connection gets where this is assigned. */
  function toStore(key: PropertyKey, value: unknown): unknown {
    // A patched method that is put back must not fail when this task has ended.
    // WeakMap.get() takes any value, although its type does not
    const original = originals.get(value as object) ?? unwrap(value);
    if (original !== value || typeof value !== "function") return original;
    // A function of the task's own is given as it was, as those who patch expect;
    // but not one that it replaces or hides, and that is put back
    let at: object | null = connection;
    while (at) {
      const own = Reflect.getOwnPropertyDescriptor(at, key)?.value;
      if (typeof own === "function") guarded(own);
      at = Reflect.getPrototypeOf(at);
    }
    if (!given.has(value)) given.set(value, value);
    return value;
  }

  const traps = { apply, get, set, defineProperty };
  // As if it were a function, which it may be
  const proxy: object = new Proxy(connection as Method, traps);
  return proxy;
}

/** What was thrown, be it `undefined`. */
type Failure = { readonly error: unknown } | undefined;

/** What a task fails with: its own failure and its opener's, unless one has both. */
function both(own: Failure, opener: Failure): Failure {
  if (!own || !opener) return own ?? opener;
  if (has(opener.error, own.error)) return opener;
  if (has(own.error, opener.error)) return own;
  return { error: new SuppressedError(opener.error, own.error, BOTH) };
}

/** Whether an error is another one, or its `cause` or `suppressed` is. */
function has(error: unknown, other: unknown): boolean {
  if (error === other) return true;
  if (!(error instanceof Error)) return false;
  // The other may be `undefined`, which an error without a cause does not have
  if ("cause" in error && error.cause === other) return true;
  return "suppressed" in error && error.suppressed === other;
}

/** The error of what can only be done before the task has ended. */
function endedError(act: string): Error {
  const message = "the task has ended, start another with run()";
  return new BadResource(`Cannot ${act}: ${message}`);
}

/** Lets a promise reject although nobody may await it. */
function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}

/** Rejects quietly. Wrong use, such as a second `connect()`, rejects aloud. */
function rejected(error: unknown): Promise<never> {
  return quiet(Promise.reject(error));
}
