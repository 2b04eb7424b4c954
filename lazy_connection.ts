// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";

const { AlreadyExists, BadResource, Busy, NotConnected } = Deno.errors;
const BOTH = "Cannot close the connection: there was another error before";
const CONNECTED = "Cannot connect: the task is already connected or " +
  "connecting, leave that block or start another task with run()";
const DISPOSED = "Cannot use the LazyConnection: it has been disposed of";
const ENDED = "Cannot connect: the task has ended, start another with run()";
const LENT = "Cannot lend: the opener has lent already, retry around run()";
const LENT_TO_ANOTHER = "Cannot lend: another task has this connection";
const NO_BLOCK = "Cannot connect: a block cannot dispose of it, call get()";
const NO_TASK = "Cannot get a connection: there is no task, call run() first";
const OVER = "Cannot use the connection: the opener is over, it must " +
  "`await lend(connection)` until its task is over";
/** Made once: for each connection, it would take longer than all else here. */
const LEFT = new BadResource("Cannot lend: the connection was disposed of");

/**
 * Opens a connection, lends it to the task that asked for it, and closes it.
 *
 * `await lend(connection)` takes as long as the task has the connection, and
 * tells how that ended: it resolves if the task succeeded, and rejects with the
 * task's error if it failed. If the connection or the `LazyConnection` is
 * disposed of first, it rejects with a `Deno.errors.BadResource`. An opener may
 * do with that what any function may: use `using` or `try … finally`, commit or
 * roll back, or hand `lend` on to a function that does. It must not be over
 * before `lend()` is.
 *
 * The opener is called inside the task, once for each attempt to connect, and
 * lends once. What it rejects with reaches the task.
 *
 * An attempt that is cancelled is over at once, whatever its opener does. An
 * opener that heeds `signal` should reject with its `reason`; where it does not
 * heed it, `lend()` rejects with that. An opener must not wait for its own
 * `LazyConnection`: it would wait for itself.
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
 * With the handshake in the opener, a wrong certificate rejects the attempt,
 * and cancelling closes the socket of a server that does not answer.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const lazy = new LazyConnection<Deno.TlsConn>(async (lend, signal) => {
 *   using conn = await Deno.connectTls({ hostname: "example.com", port: 443 });
 *   signal.onabort = () => conn.close();
 *   await conn.handshake().catch((error) => {
 *     throw signal.reason ?? error;
 *   });
 *   await lend(conn);
 * });
 * ```
 *
 * @example A file
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const lazy = new LazyConnection<Deno.FsFile>(async (lend) => {
 *   using file = await Deno.open("data.csv");
 *   await lend(file);
 * });
 * ```
 *
 * @example A client, here that of `npm:pg`
 * ```ts ignore
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * // @ts-types="npm:@types/pg@^8"
 * import pg from "npm:pg@^8";
 *
 * const lazy = new LazyConnection<pg.Client>(async (lend) => {
 *   const client = new pg.Client({ connectionTimeoutMillis: 5_000 });
 *   client.on("error", console.error); // or an error ends the process
 *   try {
 *     await client.connect();
 *     await lend(client);
 *   } finally {
 *     await client.end();
 *   }
 * });
 * ```
 *
 * @example A transaction, here that of `npm:knex`
 * ```ts ignore
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import knex, { type Knex } from "npm:knex@^3";
 * import "npm:pg@^8";
 *
 * const db = knex({
 *   client: "pg",
 *   connection: {}, // as PGHOST, PGUSER and the like say
 *   pool: { min: 0, max: 5 },
 *   acquireConnectionTimeout: 5_000, // milliseconds
 * });
 * const lazy = new LazyConnection<Knex.Transaction>(
 *   (lend) => db.transaction(lend),
 * );
 * ```
 *
 * @typeParam C The type of the connection.
 * @param lend Lends the connection. It never throws; it rejects with a
 * `Deno.errors.Busy` if the same `LazyConnection` has lent the connection to
 * another task, and with a `TypeError` if it is called again.
 * @param signal Aborts when the attempt is cancelled, and never once the
 * connection is lent.
 * @returns A promise that settles when the connection is closed.
 */
export type Opener<C extends object> = (
  lend: (connection: C) => Promise<void>,
  signal: AbortSignal,
) => PromiseLike<void>;

/**
 * One object for many tasks, each of which has a connection of its own.
 *
 * A *task* is a call of `run()`, with everything that it starts; code outside
 * of any `run()` is in the *main task*. A task has at most one connection at a
 * time, which an *opener* opens, *lends* to it, and closes. The task has it
 * until it is *disposed of*: by the end of the task, by leaving the block of a
 * `connect()`, or by the disposal of the `LazyConnection`.
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
  readonly #signal: AbortSignal | undefined;
  readonly #tasks = new AsyncLocalStorage<Task>();
  readonly #main = new Task();
  /** The openers that are not over. */
  readonly #loans = new Set<Loan>();
  /** The connections that are lent. */
  readonly #lent = new Set<object>();
  #disposed = false;

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
   * closes no connection.
   */
  constructor(
    target: Opener<C> | (Deno.TcpConn extends C ? Deno.ConnectOptions : never),
  ) {
    if (typeof target === "function") {
      this.#opener = target;
      return;
    }
    const { signal, ...options }: Deno.ConnectOptions = target;
    this.#signal = signal;
    this.#opener = async (lend, signal) => {
      // Deno.connect() calls this last. If it threw, a socket that opened just
      // as the signal aborted would be lost; lend() rejects instead.
      signal.throwIfAborted = () => {};
      const conn = await Deno.connect({ ...options, signal }).catch((error) => {
        throw signal.aborted ? signal.reason : error;
      });
      try {
        await lend(conn as object as C); // so says the type of `target`
      } finally {
        conn[Symbol.dispose](); // `using` would take longer
      }
    };
  }

  /**
   * The current task's connection, or `undefined`. It opens nothing: see
   * `get()` for that.
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
   * @returns The connection, or `undefined` if none is lent to the task.
   */
  get current(): C | undefined {
    // Nothing but a C is lent
    return (this.#tasks.getStore() ?? this.#main).loan?.lent as C | undefined;
  }

  /**
   * Calls a function as a task of its own: the counterpart of starting a
   * thread.
   *
   * When the function's promise settles, the task ends. `lend()` then settles
   * in the same way, and `run()` waits for the opener: what the opener rejects
   * with, such as a refused COMMIT, the task fails with. An attempt to connect
   * that is still going on is cancelled.
   *
   * Whatever outlives the function, such as a stream or a promise that nobody
   * awaits, then has no connection.
   *
   * A `run()` inside a task starts another task, with a connection of its own.
   *
   * @example A transaction for each task
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * const log: string[] = [];
   * const lazy = new LazyConnection<{ query(sql: string): void }>(
   *   async (lend) => {
   *     const client = { query: (sql: string) => void log.push(sql) };
   *     client.query("BEGIN");
   *     try {
   *       await lend(client);
   *     } catch (error) {
   *       client.query("ROLLBACK");
   *       throw error;
   *     }
   *     client.query("COMMIT");
   *   },
   * );
   *
   * await lazy.run(async () => {
   *   const client = await lazy.get();
   *   client.query("UPDATE");
   * });
   * assertEquals(log.splice(0), ["BEGIN", "UPDATE", "COMMIT"]);
   *
   * const failed = lazy.run(async () => {
   *   await lazy.get();
   *   throw new Error("no");
   * });
   * await assertRejects(() => failed, Error, "no");
   * assertEquals(log, ["BEGIN", "ROLLBACK"]);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns.
   * @param callback The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {Deno.errors.BadResource} If the `LazyConnection` has been disposed
   * of: before the call, and the function is not called; or later, while the
   * task had a connection.
   * @throws {SuppressedError} If the function fails and then the opener fails
   * with an error that does not carry the function's as its `cause` or its
   * `suppressed`: `suppressed` is the function's error, `error` the opener's.
   */
  async run<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    if (this.#disposed) throw new BadResource(DISPOSED);
    const task = new Task();
    // A thenable, such as a query that runs once it is awaited, runs in the task
    const call = () => Promise.resolve(callback(...args));
    try {
      return await this.#tasks.run(task, call);
    } catch (error) {
      task.failure = { error };
      throw error;
    } finally {
      await task.end();
    }
  }

  /**
   * Calls a function as a part of the current task, or as a task of its own
   * where there is none or it has ended.
   *
   * It is for a function that must be a unit of its own, but may be a part of a
   * larger one. A part that fails fails the whole task, even if the task catches
   * the part's error: half a unit of work must not be committed.
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
   * @typeParam R What the function returns.
   * @param callback The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {Deno.errors.BadResource} As `run()`, if it starts a task.
   * @throws {SuppressedError} As `run()`, if it starts a task.
   */
  async runOrJoin<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    const task = this.#tasks.getStore();
    if (!task || task.ended) return await this.run(callback, ...args);
    try {
      return await callback(...args);
    } catch (error) {
      task.failure = { error };
      throw error;
    }
  }

  /**
   * Gets the current task's connection: the one that it has, else the one that
   * is being opened, whoever began that, else a new one.
   *
   * However deep in the call stack it is asked for, and by however many at
   * once, the task opens one connection, and keeps it to its end. While an
   * earlier one is closing, `get()` waits for that.
   *
   * If the attempt fails or is cancelled, it fails for all who wait for it, and
   * the next call tries again. A time-out belongs in the opener or, for one
   * caller's wait alone, in `abortable` of `@std/async` around this promise.
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
   * @returns The connection.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {Deno.errors.Busy} If the opener lends another task's connection.
   * @throws {Deno.errors.NotConnected} Outside of `run()`.
   * @throws {TypeError} If the opener is over without having lent a connection,
   * or before its task is over.
   */
  get(): Promise<C> {
    const task = this.#tasks.getStore();
    if (!task) return Promise.reject(new NotConnected(NO_TASK));
    return this.#connection(task) as Promise<C>; // nothing but a C is lent
  }

  /**
   * Opens a connection for a block, inside or outside of `run()`, or rejects if
   * the task has one.
   *
   * Leaving the block of `await using` closes the connection, waits for that,
   * and gets its errors. Leaving the block of `using` starts closing it, and
   * what fails in that fails the task. (In the main task, the disposal of the
   * `LazyConnection` rejects with it.) The task may then connect again, which
   * waits for the earlier connection to be closed.
   *
   * A block does not know how it was left, so leaving it is no success: `lend()`
   * rejects. A connection that commits is for `get()`.
   *
   * The connection is the very object that the opener lends. Its
   * `Symbol.asyncDispose` and, where there is one, its `Symbol.dispose` are
   * replaced until it is disposed of, and then put back. (A `Symbol.asyncDispose`
   * that it lacked stays, and calls its `Symbol.dispose`.) A block that is left
   * after that does nothing.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: server.addr.port });
   * {
   *   await using conn = await lazy.connect();
   *   assertEquals(conn.remoteAddr.port, server.addr.port);
   * } // closed here
   * assertEquals(lazy.current, undefined);
   * ```
   *
   * @example A time-out, in milliseconds
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * // An opener that never answers
   * const lazy = new LazyConnection(() => new Promise(() => {}));
   *
   * const error = await assertRejects(
   *   () => lazy.connect({ signal: AbortSignal.timeout(100) }),
   *   DOMException,
   * );
   * assertEquals(error.name, "TimeoutError");
   * ```
   *
   * @param options The options of this attempt.
   * @param options.signal Cancels the attempt, which then rejects at once with
   * the signal's `reason`. It has no effect once the connection is lent.
   * @returns The connection, made `AsyncDisposable`.
   * @throws {Deno.errors.AlreadyExists} If the task has a connection, or is
   * opening one.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {Deno.errors.Busy} If the opener lends another task's connection.
   * @throws {TypeError} If the connection cannot be disposed of or does not
   * take other methods for that, if the opener is over without having lent a
   * connection or before its task is over, or if `signal` is invalid.
   */
  connect(
    this: LazyConnection<Disposable | AsyncDisposable>,
    { signal }: { signal?: AbortSignal | undefined } = {},
  ): Promise<C & AsyncDisposable> {
    const task = this.#tasks.getStore() ?? this.#main;
    const { loan } = task;
    if (loan && !loan.lost) return Promise.reject(new AlreadyExists(CONNECTED));
    // Nothing but a C is lent, and to a block an AsyncDisposable
    return this.#connection(task, true, signal) as Promise<C & AsyncDisposable>;
  }

  #connection(task: Task, forBlock = false, signal = this.#signal) {
    const why = this.#disposed ? DISPOSED : task.ended ? ENDED : undefined;
    if (why) return quiet(Promise.reject(new BadResource(why)));
    if (task.loan) return task.loan.connection;
    const loan = task.loan = new Loan(task, this.#lent);
    this.#loans.add(loan);
    this.#call(loan, forBlock, signal);
    return loan.connection;
  }

  /** Calls the opener, once an earlier one of the same task is over. */
  async #call(loan: Loan, forBlock: boolean, signal?: AbortSignal) {
    let cancel: AbortSignal | undefined;
    const abort = () =>
      loan.state === "opening" && loan.end({ error: cancel?.reason });
    try {
      // Not the given signal itself: an EventTarget searches all its listeners
      // whenever one is added or removed, and many attempts may share a signal.
      cancel = signal && AbortSignal.any([signal, this.#signal ?? signal]);
      cancel?.throwIfAborted();
      cancel?.addEventListener("abort", abort);
      if (loan.task.closing) await loan.task.closing;
      if (loan.state === "opening") {
        const lend = (connection: C) => quiet(loan.lend(connection, forBlock));
        await this.#opener(lend, loan.attempt.signal);
      }
      loan.finish();
    } catch (error) {
      loan.finish({ error });
    }
    cancel?.removeEventListener("abort", abort);
    this.#loans.delete(loan);
  }

  /**
   * Has every connection closed, cancels every attempt to connect, and refuses
   * whatever comes later. It waits for all openers, but not for tasks to end.
   *
   * A task that had a connection fails with a `Deno.errors.BadResource`, even if
   * its function succeeds: what was not committed is no success.
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
   * @returns A promise that resolves once nothing is open.
   * @throws {SuppressedError} If closing fails for several connections, as with
   * several `await using`; the error itself, if it fails for one.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    const error = new BadResource(DISPOSED);
    const failures = Array.from(this.#loans, async (loan) => {
      const { state, task, attempt: { signal } } = loan;
      if (state === "lent") task.failure ??= { error };
      const failure = await loan.end({ error });
      if (state === "closing") return; // somebody else is told
      return without(failure, signal.aborted ? signal.reason : error);
    });
    await this.#main.closing;
    let failure = both(this.#main.unheard, this.#main.loan?.lost);
    this.#main.unheard = this.#main.loan = undefined; // told once
    for (const other of failures) failure = both(failure, await other);
    if (failure) throw failure.error;
  }
}

/**
 * Wraps `lend()` so that what it lends is of no use once the task is over.
 *
 * A branch of a task may outlive it, such as a promise that nobody awaits. With
 * many clients, it could then write into the next task's transaction, on the
 * same connection of a pool. What `revocable(lend)` lends is a `Proxy` of the
 * connection, which is revoked when `lend()` settles: whatever uses it or its
 * methods later gets a `TypeError`.
 *
 * It does not stop what has begun by then, such as a query that was built
 * earlier and is only awaited later. A method that returns its `this` returns
 * the connection itself.
 *
 * @example Usage
 * ```ts
 * import { LazyConnection, revocable } from "@cookbook/lazy-connection";
 * import { assertThrows } from "@std/assert";
 *
 * const lazy = new LazyConnection<{ query(sql: string): void }>(
 *   (lend) => revocable(lend)({ query() {} }),
 * );
 * let leftover: { query(sql: string): void } | undefined;
 * await lazy.run(async () => {
 *   leftover = await lazy.get();
 *   leftover.query("SELECT 1");
 * });
 * assertThrows(() => leftover?.query("SELECT 2"), TypeError);
 * ```
 *
 * @typeParam C The type of the connection.
 * @param lend What an opener lends by.
 * @returns A function to lend by in its place.
 */
export function revocable<C extends object>(
  lend: (connection: C) => Promise<void>,
): (connection: C) => Promise<void> {
  return (connection) => {
    const { proxy, revoke } = Proxy.revocable(connection, {
      get(target, key) {
        const part: unknown = Reflect.get(target, key);
        const own = Reflect.getOwnPropertyDescriptor(target, key);
        // Symbols name methods that are put back, such as those of disposal, and
        // a proxy has to give what is not configurable as it is
        const asItIs = typeof key === "symbol" || own?.configurable === false;
        if (typeof part !== "function" || asItIs) return part;
        return new Proxy(part, {
          // A method works on the connection itself: it may have private fields,
          // and may go on after its task, as the callbacks of a client do
          apply(method, self, args) {
            Reflect.has(proxy, key); // throws once it is revoked
            return Reflect.apply(method, self === proxy ? target : self, args);
          },
        });
      },
    });
    return quiet(lend(proxy).finally(revoke));
  };
}

/** A call of `run()`, or all that is outside of any. */
class Task {
  ended = false;
  /** Why it fails, even if its function succeeds. */
  failure: Failure;
  /** What its connections failed with in closing, where nobody was told. */
  unheard: Failure;
  /** Its connection, from the call of the opener until it is disposed of. */
  loan: Loan | undefined;
  /** Resolves when a connection that is closing is closed. */
  closing: Promise<unknown> | undefined;

  /** Ends it, and throws what it fails with. */
  async end(): Promise<void> {
    this.ended = true;
    const { loan, failure = this.unheard } = this;
    if (loan?.state === "opening") loan.end({ error: new BadResource(ENDED) });
    else if (loan) {
      this.unheard = both(this.unheard, await loan.end(failure));
    }
    await this.closing;
    const all = both(failure, this.unheard);
    if (all) throw all.error;
  }
}

/** A call of the opener, until the opener is over. */
class Loan {
  state: "opening" | "cancelled" | "lent" | "closing" = "opening";
  readonly attempt = new AbortController();
  readonly #opened = Promise.withResolvers<object>();
  /** What `connect()` and `get()` return. */
  connection = this.#opened.promise;
  /** The connection, while it is lent. */
  lent: object | undefined;
  /** What the opener failed with while the connection was lent. */
  lost: Failure;
  readonly #returned = Promise.withResolvers<void>();
  readonly #over = Promise.withResolvers<Failure>();
  #putBack = () => {};

  constructor(readonly task: Task, readonly allLent: Set<unknown>) {}

  async lend(connection: object, forBlock: boolean): Promise<void> {
    const { task: { failure }, allLent, state } = this;
    if (state !== "opening") {
      await this.connection; // rejects, if nothing was lent
      throw new TypeError(LENT, failure && { cause: failure.error });
    }
    if (allLent.has(connection)) throw new Busy(LENT_TO_ANOTHER);
    if (forBlock) this.#replaceDisposal(connection);
    this.state = "lent";
    this.lent = connection;
    allLent.add(connection);
    this.#opened.resolve(connection);
    await this.#returned.promise;
  }

  /** Replaces the methods by which a block disposes of the connection. */
  #replaceDisposal(connection: Disposal): void {
    const { [Symbol.dispose]: sync, [Symbol.asyncDispose]: async } = connection;
    if (!sync && !async) throw new TypeError(NO_BLOCK);
    const set = (dispose: unknown, asyncDispose: unknown) => {
      connection[Symbol.asyncDispose] = asyncDispose;
      if (sync) connection[Symbol.dispose] = dispose;
    };
    set(() => {
      const { task, lost } = this;
      if (task.loan !== this) return;
      const end = this.end({ error: LEFT });
      if (lost) throw lost.error;
      task.closing = end.then((failure) => {
        task.closing = undefined;
        task.unheard = both(task.unheard, without(failure, LEFT));
      });
    }, async () => {
      if (this.task.loan !== this) return;
      const failure = without(await this.end({ error: LEFT }), LEFT);
      if (failure) throw failure.error;
    });
    this.#putBack = () => set(sync, async ?? disposeAsync);
  }

  /** Ends it, and resolves to what the opener fails with. */
  end(failure: Failure): Promise<Failure> {
    if (this.task.loan === this) this.task.loan = undefined;
    if (this.state === "opening") {
      this.state = "cancelled";
      this.#opened.reject(failure?.error);
      quiet(this.connection);
      this.attempt.abort(failure?.error);
    } else if (this.state === "lent") {
      this.state = "closing";
      this.allLent.delete(this.lent);
      this.lent = undefined;
      this.task.closing = this.#over.promise;
      if (failure) this.#returned.reject(failure.error);
      else this.#returned.resolve();
      this.#putBack();
    }
    return this.#over.promise;
  }

  /** The opener is over. */
  finish(failure?: Failure): void {
    const { state, task } = this;
    if (state === "opening" || state === "lent") {
      const { error } = this.lost = failure ??= { error: new TypeError(OVER) };
      if (state === "opening") this.state = "closing"; // cancels nothing
      this.end(failure);
      this.#opened.reject(error); // unless it was lent
      if (state === "lent") {
        task.loan = this; // until it is disposed of
        this.connection = quiet(Promise.reject(error));
      }
    }
    if (task.closing === this.#over.promise) task.closing = undefined;
    this.#over.resolve(failure);
  }
}

/** The methods of an object, if it has them, that a block disposes of it by. */
type Disposal = { [Symbol.dispose]?: unknown; [Symbol.asyncDispose]?: unknown };

/** What `await using` does where there is no more than `Symbol.dispose`. */
async function disposeAsync(this: Disposable): Promise<void> {
  await this[Symbol.dispose]();
}

/** What was thrown, be it `undefined`. */
type Failure = { readonly error: unknown } | undefined;

/** One failure out of two, as `await using` makes it, unless one carries the other. */
function both(earlier: Failure, later: Failure): Failure {
  if (!earlier || !later) return earlier ?? later;
  if (carries(later.error, earlier.error)) return later;
  if (carries(earlier.error, later.error)) return earlier;
  return { error: new SuppressedError(later.error, earlier.error, BOTH) };
}

/** Whether an error is another one, or has it as its `cause` or `suppressed`. */
function carries(error: unknown, other: unknown): boolean {
  if (error === other) return true;
  const errors = new Set([error]);
  for (const error of errors) { // those too that are added meanwhile
    if (!(error instanceof Error)) continue;
    if ("cause" in error) errors.add(error.cause);
    if ("suppressed" in error) errors.add(error.suppressed);
  }
  return errors.has(other);
}

/** What is left of a failure without the reason for it, if it carries that. */
function without(failure: Failure, reason: unknown): Failure {
  if (!failure || !carries(failure.error, reason)) return failure;
  if (!(failure.error instanceof SuppressedError)) return;
  const { error, suppressed } = failure.error;
  return both(without({ error: suppressed }, reason), { error });
}

/** Lets a promise reject although nobody may await it. */
function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}
