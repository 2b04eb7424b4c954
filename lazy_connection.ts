// Copyright 2026 the LazyConnection authors. MIT license.

// How it works: `runNew()` makes a Task, and an AsyncLocalStorage finds it again
// from all code that the task starts, even after it has ended. `run()` inside a
// task makes none. The first `get()` or `connect()` makes a Loan, which is one
// call of the opener, and has a promise for each party that waits:
//
// | promise | for                  | settles                                     |
// | ------- | -------------------- | ------------------------------------------- |
// | opened  | `get()`, `connect()` | when the opener lends, or the attempt fails |
// | outcome | the opener           | when the task ends, by how it went; earlier |
// |         |                      | if a socket is closed, or by disposal       |
// | closed  | `runNew()`           | when the opener has settled                 |

import { AsyncLocalStorage } from "node:async_hooks";

const { AlreadyExists, BadResource, Busy, NotConnected } = Deno.errors;

/**
 * One object for many tasks, each of which has a connection of its own.
 *
 * A *task* is a call of `runNew()`, or of `run()` outside of any task, with
 * everything that the call starts. A call of `run()` inside a task is a *part*
 * of it. The first `get()` in a task has an *opener* open a connection and
 * *lend* it to the task, which gets a *stand-in* for it. When the task ends, the
 * opener learns whether it succeeded, and closes the connection.
 *
 * A `LazyConnection` that is made from the options of `Deno.connect` lends
 * sockets, as they are. `connect()` opens one for a `using` block, and a task
 * whose socket is closed can open another.
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
  /** Whether it is made from options. */
  readonly #lendsSockets: boolean = false;
  /** The signal of the options. */
  readonly #signal: AbortSignal | undefined;
  readonly #tasks = new AsyncLocalStorage<Task>();
  /** All code outside of tasks, which shares one socket. It never ends. */
  readonly #outside = new Task();
  /** The loans whose openers have not settled. */
  readonly #loans = new Set<Loan>();
  /** What tasks have, other than sockets: nothing is lent to two at once. */
  readonly #lent = new Set<object>();
  #disposed = false;
  /** Resolves when no loans are left, if disposal finds some. */
  readonly #idle = Promise.withResolvers<void>();

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
   * closes no socket that is already open.
   */
  constructor(
    target: Opener<C> | (Deno.TcpConn extends C ? Deno.ConnectOptions : never),
  ) {
    if (typeof target === "function") {
      this.#opener = target;
      return;
    }
    const options: Deno.ConnectOptions = { ...target };
    this.#lendsSockets = true;
    this.#signal = options.signal;
    this.#opener = async (lend, signal) => {
      // Deno.connect() calls this as its last step. If it threw there, a socket
      // that opened just as the attempt was cancelled would be lost. lend()
      // rejects instead
      signal.throwIfAborted = () => {};
      const conn = await Deno.connect({ ...options, signal });
      try {
        await lend(conn as object as C); // which it is where options are taken
      } finally { // `using` takes 0.25 µs more
        conn[Symbol.dispose]();
      }
    };
  }

  /**
   * Calls a function as a part of the current task or, outside of any, as a
   * task of its own.
   *
   * Wrap every function that needs the connection in `run()`. They can then
   * call each other within one transaction. If a part throws, the whole task
   * fails, even if the caller catches the error: half of the work must not be
   * committed. For the same reason, a task fails if one of its parts is still
   * pending when its own function resolves.
   *
   * When the promise of a part resolves, nothing is committed yet. That happens
   * when the task ends.
   *
   * @example Two functions, one transaction
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * const log: string[] = [];
   * const lazy = new LazyConnection<{ query(sql: string): void }>(
   *   async (lend) => {
   *     log.push("BEGIN");
   *     await lend({ query: (sql) => void log.push(sql) }).catch((error) => {
   *       log.push("ROLLBACK");
   *       throw error;
   *     });
   *     log.push("COMMIT");
   *   },
   * );
   *
   * const add = (account: string, amount: number) =>
   *   lazy.run(async () => {
   *     const client = await lazy.get();
   *     client.query(`${account} += ${amount}`);
   *     if (Math.abs(amount) > 100) throw new RangeError("Cannot add so much");
   *   });
   * const transfer = (amount: number) =>
   *   lazy.run(async () => {
   *     await add("a", -amount);
   *     await add("b", amount);
   *   });
   *
   * await add("c", 1);
   * assertEquals(log.splice(0), ["BEGIN", "c += 1", "COMMIT"]);
   * await transfer(2);
   * assertEquals(log.splice(0), ["BEGIN", "a += -2", "b += 2", "COMMIT"]);
   * await assertRejects(() => transfer(200), RangeError);
   * assertEquals(log, ["BEGIN", "a += -200", "ROLLBACK"]);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns, which may be a promise.
   * @param callback The function to call. It may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {unknown} Whatever the function fails with. Outside of any task,
   * whatever else `runNew()` throws.
   * @throws {Deno.errors.BadResource} If the task has ended.
   * @throws {TypeError} If the function returns a generator, whose body would
   * run outside of the task.
   */
  run<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    const task = this.#tasks.getStore();
    return task ? task.part(callback, args) : this.runNew(callback, ...args);
  }

  /**
   * Calls a function as a task of its own, wherever it is called.
   *
   * Use it for work that is independent of the code around it: a request, a
   * job, a timer, an item of a queue. Inside another task, it commits or rolls
   * back by itself, whatever becomes of the outer task. There it takes a second
   * connection, and deadlocks if the outer task holds the last one of the pool,
   * or a lock that it needs.
   *
   * The task ends when the function's promise settles. An opener that has lent
   * to it then commits or rolls back, and `runNew()` waits until the opener has
   * settled. If it fails, such as by a refused COMMIT, so does `runNew()`. An
   * attempt to connect that is still going on is cancelled.
   *
   * To roll back, throw. A response that is returned commits, even a 500.
   * Nothing that outlives the task can get its connection, so await everything
   * that you start. A timeout goes inside:
   * `runNew(() => deadline(work(), 1_000))`. Around `runNew()`, it would
   * reject, but the task would go on, and commit.
   *
   * @example A task inside a task
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * const stored: string[] = [];
   * const lazy = new LazyConnection<string[]>(async (lend) => {
   *   const rows: string[] = [];
   *   await lend(rows); // rejects if the task fails
   *   stored.push(...rows);
   * });
   *
   * async function insert(row: string) {
   *   const rows = await lazy.get();
   *   rows.push(row);
   * }
   * async function order() {
   *   await insert("order");
   *   await lazy.runNew(insert, "audit");
   *   throw new Error("out of stock");
   * }
   *
   * await assertRejects(() => lazy.runNew(order), Error, "out of stock");
   * assertEquals(stored, ["audit"]);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns, which may be a promise.
   * @param callback The function to call. It may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {unknown} Whatever the function fails with, or the opener after it
   * has lent.
   * @throws {Error} If a part of the task has failed, although the function
   * resolves. Its `cause` is the part's error.
   * @throws {SuppressedError} If both the task and its opener fail, unless one
   * error is the other's `cause` or `suppressed`: `suppressed` is the task's
   * error, `error` the opener's.
   * @throws {Deno.errors.BadResource} If the `LazyConnection` was disposed of
   * before the call (the function is then not called), or while the task had a
   * connection, even if the function resolves.
   * @throws {TypeError} If a part of the task is pending when the function
   * resolves, if the function returns a generator, or if the opener does not
   * wait for `lend()`.
   */
  async runNew<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    if (this.#disposed) throw disposedError("start a task");
    const task = new Task();
    // Promise.resolve() is called inside, so that a thenable, such as a query
    // that is sent once it is awaited, is awaited in the task
    const call = () => Promise.resolve(callback(...args));
    let result!: Awaited<R>; // read only if nothing failed
    let failure: Failure;
    try {
      result = noGenerator(await this.#tasks.run(task, call));
      task.check();
    } catch (error) {
      failure = { error };
    }
    const { loan } = task; // before end() lets go of it
    task.end(failure);
    // The opener of a cancelled attempt, which has no outcome, is not waited for
    if (loan?.outcome) failure = both(failure, await loan.closed);
    if (failure) throw failure.error;
    return result;
  }

  /**
   * Gets the task's connection: the one that it has, the one that is being
   * opened, or a new one.
   *
   * All calls in a task, however deep and however many at once, get the same
   * connection. So call it where you need it, and keep no connection in a
   * variable that tasks share.
   *
   * If the attempt fails or is cancelled, it fails for all who wait for it, and
   * the next call tries again. A failed attempt that nobody awaits yet does not
   * end the process.
   *
   * Outside of any task it opens nothing. There, it gives the socket that
   * `connect()` has opened or is opening.
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
   *   { hostname: "127.0.0.1", port: 0, onListen() {} },
   *   () => lazy.runNew(handle),
   * );
   * const response = await fetch(`http://127.0.0.1:${server.addr.port}`);
   * assertEquals(await response.text(), "one connection");
   * ```
   *
   * @returns The connection: a stand-in for what an opener has lent, or the
   * socket itself.
   * @throws {unknown} Whatever the opener fails with, or `Deno.connect`.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {Deno.errors.Busy} If the opener lends another task's connection.
   * @throws {Deno.errors.NotConnected} Outside of any task, if `connect()` has
   * opened nothing there.
   * @throws {TypeError} If the opener settles without having lent a connection,
   * or before the task has ended.
   */
  get(): Promise<C> {
    const task = this.#tasks.getStore() ?? this.#outside;
    const refusal = this.#refusal(task, "get a connection");
    if (refusal) return rejectedQuietly(refusal.error);
    if (task.loan) return task.loan.opened.promise as Promise<C>; // only a C is lent
    if (task === this.#outside) {
      const message =
        "Cannot get a connection: there is no task; call runNew() for a request, or run() for a function";
      return Promise.reject(new NotConnected(message));
    }
    return this.#borrow(task) as Promise<C>; // only a C is lent
  }

  /**
   * Opens a socket for a `using` block, inside or outside of a task. It is for
   * a `LazyConnection` that is made from the options of `Deno.connect`.
   *
   * The socket is closed at the end of the block, when it is disposed of, or
   * earlier by its `close()`. The task can then open another. Reaching the end of
   * its `readable` or `writable` does not dispose of it. `Deno.startTls` gives a
   * new connection, which you must close.
   *
   * With an opener, use `get()`: the end of a block does not tell whether the
   * block succeeded, so the opener could not commit.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertNotEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: server.addr.port });
   * const ports: number[] = [];
   * for (let i = 0; i < 2; i++) {
   *   using conn = await lazy.connect();
   *   ports.push(conn.localAddr.port);
   * } // closed here
   * assertNotEquals(ports[0], ports[1]);
   * assertEquals(ports.length, 2);
   * ```
   *
   * @example A timeout, in milliseconds
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
   * @throws {Deno.errors.AlreadyExists} If there is a socket in the task, or
   * one is being opened. Outside of any task, likewise.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or during it.
   * @throws {TypeError} If the `LazyConnection` is made from an opener, or if
   * `signal` is invalid.
   */
  connect(
    this: LazyConnection<Deno.TcpConn>,
    { signal }: { signal?: AbortSignal | undefined } = {},
  ): Promise<Deno.TcpConn> {
    const task = this.#tasks.getStore() ?? this.#outside;
    const refusal = this.#refusal(task, "connect");
    if (refusal) return rejectedQuietly(refusal.error);
    if (!this.#lendsSockets) {
      const message =
        "Cannot connect: this LazyConnection is made from an opener; call get()";
      return Promise.reject(new TypeError(message));
    }
    if (task.loan) {
      const message =
        "Cannot connect: already connected or connecting; get() gives that socket, close it first, or connect in runNew()";
      return Promise.reject(new AlreadyExists(message));
    }
    // Only sockets are lent
    return this.#borrow(task, signal) as Promise<Deno.TcpConn>;
  }

  /** The reason to refuse the task a connection, if there is one. */
  #refusal(task: Task, act: string): Failure {
    if (task.ended) return { error: endedError(act) };
    if (this.#disposed) return { error: disposedError(act) };
    return task.loan?.failure; // the opener has settled before the task
  }

  /** Has the opener open a connection for the task. */
  #borrow(task: Task, signal?: AbortSignal): Promise<object> {
    // Set first: the opener may fail, or call get(), before it returns
    const loan = task.loan = new Loan(task);
    this.#loans.add(loan);
    loan.closed = this.#callOpener(loan, signal);
    return loan.opened.promise;
  }

  /** Calls the opener, and resolves to what `Loan.settle()` returns. */
  async #callOpener(loan: Loan, signal?: AbortSignal): Promise<Failure> {
    let failure: Failure;
    let canceller: AbortSignal | undefined;
    const onAbort = () => loan.cancel(canceller?.reason);
    try {
      if (signal !== undefined || this.#signal !== undefined) {
        const signals = [signal, this.#signal].filter((it) => it !== undefined);
        // Not the signals themselves: an EventTarget searches all its listeners
        // whenever one is added or removed, and many attempts may share a signal
        canceller = AbortSignal.any(signals);
        canceller.throwIfAborted();
        canceller.addEventListener("abort", onAbort);
      }
      const lend = (connection: C) => this.#lend(loan, connection);
      const opener = this.#opener; // so that it is called without `this`
      await opener(lend, loan.controller.signal);
    } catch (error) {
      failure = { error };
    }
    canceller?.removeEventListener("abort", onAbort);
    this.#loans.delete(loan);
    if (this.#disposed && this.#loans.size === 0) this.#idle.resolve();
    return loan.settle(failure);
  }

  /** Lends what an opener has opened, or says why it can't. */
  #lend(loan: Loan, connection: C): Promise<void> {
    const { failure, outcome, state } = loan;
    if (outcome) {
      const message =
        "Cannot lend: the opener has lent already; retry around runNew()";
      const cause = failure && { cause: failure.error };
      return rejectedQuietly(new TypeError(message, cause));
    }
    if (state === "ended") return rejectedQuietly(failure?.error);
    // A thenable would be unwrapped where it resolves a promise
    const isObject = Object(connection) === connection;
    if (!isObject || typeof Reflect.get(connection, "then") === "function") {
      const message =
        "Cannot lend: the connection must be an object, and no promise";
      return rejectedQuietly(new TypeError(message));
    }
    if (this.#lendsSockets) {
      const socket = connection as object as Deno.TcpConn; // only those are lent
      return loan.lend(endOnClose(socket, loan));
    }
    if (this.#lent.has(connection)) {
      const message = "Cannot lend: another task has this connection";
      return rejectedQuietly(new Busy(message));
    }
    this.#lent.add(connection);
    const returned = loan.lend(standIn(connection, loan));
    const release = () => this.#lent.delete(connection);
    // This comes before the opener goes on, which may hand the connection on. It
    // also handles a rejection that the opener does not wait for
    returned.then(release, release);
    return returned;
  }

  /**
   * Takes every connection from its task, so that openers roll back and close,
   * cancels every attempt to connect, and refuses tasks and connections from
   * then on. It waits for all openers, but not for tasks to end.
   *
   * A task that had a connection fails even if its function resolves, then with
   * a `Deno.errors.BadResource`: work that is not committed is no success. If
   * its opener fails, too, `runNew()` rejects with both errors.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertRejects } from "@std/assert";
   *
   * const lazy = new LazyConnection<Date>((lend) => lend(new Date()));
   *
   * const task = lazy.runNew(async () => {
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
    this.#disposed = true; // before a signal aborts, whose listeners may call in
    for (const loan of this.#loans) {
      if (loan.state === "opening") loan.cancel(disposedError("connect"));
      else loan.end({ error: disposedError("use the connection") });
    }
    this.#outside.loan = undefined; // as Task.end() does for others
    if (this.#loans.size > 0) await this.#idle.promise;
  }
}

/**
 * Opens a connection, lends it to the task that asked for it, and closes it.
 *
 * `await lend(connection)` takes as long as the task has the connection. It
 * resolves if the task succeeds, and rejects with the task's error if it fails.
 * So an opener commits after it, rolls back in a `catch`, which throws the error
 * again, and closes in a `finally`. The task itself does none of these.
 * `(lend) => db.transaction(lend)` is an opener, too.
 *
 * The opener is called inside the task, once for each attempt to connect. If it
 * fails before it lends, the attempt rejects with its error. If it fails later,
 * the task does. Inside an opener:
 *
 * - Always wait for `lend()` to settle. After `deadline(lend(client), 5_000)`,
 *   the task would go on beside the ROLLBACK. A timeout belongs around the work,
 *   inside the task: `runNew(() => deadline(work(), 5_000))`.
 * - Do not wait for `get()` of the same `LazyConnection`, nor for its disposal:
 *   both wait for the opener.
 * - Once the task has ended, such as after COMMIT, `run()` is refused. Call
 *   `runNew()`.
 *
 * The *stand-in* that the task gets is a `Proxy`. It works like the connection
 * until the task ends, or the opener settles. From then on, reading a property
 * of it, assigning to one and calling a method throw, once the task has ended a
 * `Deno.errors.BadResource`, so that nobody writes into somebody else's
 * transaction. Even an asynchronous method throws, before it returns a promise.
 *
 * - What the connection gives, such as a builder, a prepared statement, a
 *   cursor or a stream, is not guarded, and a query that has been sent goes on.
 * - Only its opener closes the connection: `using` throws a `TypeError` at the
 *   head of its block.
 * - Each task gets its own stand-in. What is set up once for each client, such
 *   as a listener, is set up in the opener.
 * - APIs that need the actual object, such as `backup()` of `node:sqlite`,
 *   reject a stand-in, and a stream that is piped into one throws in its
 *   listener once the task has ended. For these, lend
 *   `Object.freeze({ client })`: it gives `client` as it is, so that nothing of
 *   it is guarded.
 * - A method that the task patches must be put back, by assignment, before the
 *   task ends.
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
 *     log.push("close");
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
 * assertEquals(log.splice(0), ["BEGIN", "INSERT 1", "COMMIT", "close"]);
 *
 * await assertRejects(() => lazy.run(insert, -1), RangeError);
 * assertEquals(log, ["BEGIN", "INSERT -1", "ROLLBACK", "close"]);
 * ```
 *
 * @typeParam C The type of the connection.
 * @param lend Lends the connection. It never throws. It rejects with a
 * `Deno.errors.Busy` if the same `LazyConnection` has lent the connection to
 * another task, and with a `TypeError` if the connection is not an object, or
 * is a promise; then nothing is lent, and the opener may lend another. It
 * rejects with the signal's `reason` if the attempt was cancelled. If it is
 * called again after it has lent, it rejects with a `TypeError`, whose `cause`
 * is the task's error, if any.
 * @param signal Aborts when the attempt is cancelled, and never once the
 * connection is lent. Its listeners may run outside of the task. A cancelled
 * attempt rejects at once. Whatever its opener does then is ignored, but
 * disposal waits for it.
 * @returns A promise that settles when the connection is closed.
 */
export type Opener<C extends object> = (
  lend: (connection: C) => Promise<void>,
  signal: AbortSignal,
) => PromiseLike<void>;

/** What was thrown, be it `undefined`. */
type Failure = { readonly error: unknown } | undefined;

type Method = (...args: unknown[]) => unknown;

/** A call of `runNew()`. There is one more for all code outside of tasks. */
class Task {
  ended = false;
  /** Its attempt to connect, then its connection. */
  loan: Loan | undefined;
  /** Its pending parts, once it has had one. */
  parts: Part[] | undefined;
  /** What a part failed with: the task fails even if that was caught. */
  partFailure: Failure;

  /** Calls a function as a part of the task. */
  async part<A extends unknown[], R>(
    callback: (...args: A) => R,
    args: A,
  ): Promise<Awaited<R>> {
    if (this.ended) throw endedError("take part in the task");
    const earlier = this.partFailure;
    const parts = this.parts ??= [];
    const part: Part = { callback, index: parts.length };
    parts.push(part);
    try {
      return noGenerator(await callback(...args));
    } catch (error) {
      // The first failure counts, or what a part that it passed makes of it
      if (!this.ended && !earlier) this.partFailure = { error };
      throw error;
    } finally { // swap and remove, as a Set takes longer
      const last = parts.pop()!;
      if (last !== part) {
        parts[part.index] = last;
        last.index = part.index;
      }
    }
  }

  /** Throws if the task must fail although its function has resolved. */
  check(): void {
    if (this.partFailure) {
      const message =
        "Cannot complete the task: a part of it failed, although its error was caught; call what may fail alone outside of run(), or in runNew()";
      throw new Error(message, { cause: this.partFailure.error });
    }
    if (this.loan?.failure) throw this.loan.failure.error;
    if (!this.parts?.length) return;
    const names = this.parts.map(({ callback }) => callback.name);
    const name = names.find((name) => name && typeof name === "string");
    const part = name ? `its part "${name}"` : "a part of it";
    const message =
      `Cannot complete the task: ${part} is pending; await each run()`;
    throw new TypeError(message);
  }

  /** Ends the task, and lets go of what its context would keep alive. */
  end(failure: Failure): void {
    const { loan } = this;
    this.ended = true; // before a signal aborts, whose listeners may call in
    this.loan = this.parts = this.partFailure = undefined;
    if (loan?.state === "opening") loan.cancel(endedError("connect"));
    else loan?.end(failure);
  }
}

/** A part that is pending, and where it is in the list of its task. */
interface Part {
  readonly callback: { readonly name: unknown };
  index: number;
}

/**
 * A call of the opener: an attempt to connect, then a connection that is lent.
 *
 * It is not generic, and neither is `Task`. Otherwise, a
 * `LazyConnection<Deno.TcpConn>` could not be assigned to a
 * `LazyConnection<Disposable>`.
 */
class Loan {
  /**
   * Until it has ended, it is its task's loan. If it fails once it was lent, it
   * stays so until the task ends; an attempt that fails does not.
   */
  state: "opening" | "lent" | "ended" = "opening";
  /** Why it has ended, unless its task succeeded or closed its socket. */
  failure: Failure;
  /** Settles what `get()` and `connect()` return. */
  readonly opened = Promise.withResolvers<object>();
  /** Settles what `lend()` returns. There is one once it has lent. */
  outcome: PromiseWithResolvers<void> | undefined;
  /** Resolves when the opener has settled, to what `settle()` returns. */
  closed: Promise<Failure> | undefined;
  /** Has the signal that the opener is called with. */
  readonly controller = new AbortController();

  constructor(readonly task: Task) {}

  /** Gives the task a stand-in or a socket. */
  lend(given: object): Promise<void> {
    this.state = "lent";
    this.outcome = Promise.withResolvers<void>();
    this.opened.resolve(given);
    return this.outcome.promise;
  }

  /** Rejects an attempt. The task can try again. */
  reject(error: unknown): void {
    this.state = "ended";
    this.failure = { error };
    this.task.loan = undefined;
    this.opened.promise.catch(() => {}); // it may have no other handler yet
    this.opened.reject(error);
  }

  /** Rejects an attempt, if it still is one, and tells the opener. */
  cancel(reason: unknown): void {
    if (this.state !== "opening") return;
    this.reject(reason); // before a signal aborts, whose listeners may call in
    this.controller.abort(reason);
  }

  /** Ends what is lent, if it still is, and tells the opener how it went. */
  end(failure?: Failure): void {
    if (this.state !== "lent") return;
    this.state = "ended";
    this.failure = failure;
    if (failure) { // it stays the task's, so that get() rejects
      this.outcome!.reject(failure.error);
    } else {
      this.task.loan = undefined;
      this.outcome!.resolve();
    }
  }

  /**
   * Ends the loan, if need be, when its opener has settled. Returns what that
   * failed with, unless it only passed on what `lend()` rejected with.
   */
  settle(failure: Failure): Failure {
    if (this.state === "opening") {
      const message =
        "Cannot connect: the opener has settled, and has lent nothing; it must `await lend(connection)`";
      failure ??= { error: new TypeError(message) };
      this.reject(failure.error);
    } else if (this.state === "lent") {
      const message =
        "Cannot use the connection: its opener has settled before the task; it must `await lend(connection)`";
      failure ??= { error: new TypeError(message) };
      this.end(failure);
    } else if (this.failure && this.failure.error === failure?.error) {
      return undefined;
    }
    return failure;
  }

  /** Throws if the task does not have the connection any more. */
  check(): void {
    if (this.task.ended) throw endedError("use the connection");
    if (this.failure) throw this.failure.error;
  }
}

/** Patches a socket, so that closing it ends its loan. */
function endOnClose(socket: Deno.TcpConn, loan: Loan): Deno.TcpConn {
  const { close, [Symbol.dispose]: dispose } = socket;
  socket.close = () => {
    loan.end(); // even if close() throws
    close.call(socket);
  };
  socket[Symbol.dispose] = () => {
    loan.end();
    dispose.call(socket);
  };
  return socket;
}

/** The methods of connections, by the guards that all stand-ins give for them. */
const methodOfGuard = new WeakMap<object, object>();

/** Makes what works like the connection as long as its task has it. */
function standIn(connection: object, loan: Loan): object {
  const guardOfMethod = new WeakMap<object, object>();
  // A method needs the connection as `this` to use its private fields
  const unwrap = <T>(value: T) => value === proxy ? connection : value;

  /** Calls the connection, or a method of it. */
  function apply(method: Method, self: object, args: unknown[]): unknown {
    loan.check();
    const result = Reflect.apply(method, unwrap(self), args);
    return result === connection ? proxy : result;
  }

  function get(_: object, key: PropertyKey, receiver: object): unknown {
    if (key === Symbol.dispose || key === Symbol.asyncDispose) {
      throw new TypeError(
        "Cannot dispose of the connection: its opener closes it when the task ends; use const, not using",
      );
    }
    // Resolving a promise reads `then`, and logging reads the tag
    if (key !== "then" && key !== Symbol.toStringTag) loan.check();
    const value: unknown = Reflect.get(connection, key, unwrap(receiver));
    const isMethod = typeof value === "function" && key !== "constructor";
    if (!isMethod && value !== connection) return value;
    const own = Reflect.getOwnPropertyDescriptor(connection, key);
    // A Proxy must give a frozen property as it is
    if (own?.writable === false && !own.configurable) return value;
    if (!isMethod || value === connection) return proxy; // the first is for types
    let guard = guardOfMethod.get(value);
    if (!guard) {
      guard = new Proxy(value, { apply });
      guardOfMethod.set(value, guard);
      methodOfGuard.set(guard, value);
    }
    return guard;
  }

  function set(_: object, key: PropertyKey, value: unknown, receiver: object) {
    loan.check();
    // If a task patches a method and puts it back, it puts back the guard, which
    // would refuse the next task. The cast is as WeakMap.get() takes any value
    const raw = methodOfGuard.get(value as object) ?? unwrap(value);
    return Reflect.set(connection, key, raw, unwrap(receiver));
  }

  // `apply` is for a connection that is a function
  const proxy: object = new Proxy(connection as Method, { apply, get, set });
  return proxy;
}

/** Combines a task's own failure with its opener's, unless one has the other. */
function both(own: Failure, opener: Failure): Failure {
  if (!own || !opener) return own ?? opener;
  if (has(opener.error, own.error)) return opener;
  if (has(own.error, opener.error)) return own;
  const message = "Cannot complete the task: it failed, and so did its opener";
  return { error: new SuppressedError(opener.error, own.error, message) };
}

/** Whether an error is another one, or its `cause` or `suppressed` is. */
function has(error: unknown, other: unknown): boolean {
  if (!(error instanceof Error)) return error === other;
  const { cause, suppressed } = error as Partial<SuppressedError>; // if it is one
  return [error, cause, suppressed].includes(other);
}

/** Refuses a generator, or what its `map()` and the like give. */
function noGenerator<T>(result: T): T {
  if (typeof result === "object") {
    const tag = Object.prototype.toString.call(result);
    if (/^\[object ((Async)?Generator|Iterator Helper)\]$/.test(tag)) {
      throw new TypeError(
        "Cannot return a generator: its body would run outside of the task; iterate inside",
      );
    }
  }
  return result;
}

/** The error for what is attempted after the task has ended. */
function endedError(act: string): Error {
  return new BadResource(
    `Cannot ${act}: the task's function has settled before this; await all that it starts, or start another task with runNew()`,
  );
}

/** The error for what is attempted, or taken away, after disposal. */
function disposedError(act: string): Error {
  return new BadResource(
    `Cannot ${act}: the LazyConnection has been disposed of`,
  );
}

/**
 * Rejects without ending the process if nobody awaits it: whether a task has
 * ended is a matter of timing, and an opener may not await `lend()`. Misuse of
 * `get()` and `connect()` rejects without this.
 */
function rejectedQuietly(error: unknown): Promise<never> {
  const promise = Promise.reject(error);
  promise.catch(() => {});
  return promise;
}
