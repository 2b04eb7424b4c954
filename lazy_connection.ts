// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";

const { AlreadyExists, BadResource, Busy } = Deno.errors;
const CONNECTED = "the task is already connected or connecting, dispose of " +
  "that connection first (leave its `using` block) or start another task " +
  "with run()";
const DISPOSED = "the LazyConnection has been disposed of";
const ENDED = "the task has ended, start another one with run()";
const HELD = "the opener gave what is still another task's connection";
const NOT_DISPOSABLE = "the opener must give an object whose " +
  "`Symbol.dispose` or `Symbol.asyncDispose` method can be replaced";

/**
 * Opens a connection: any object with a `Symbol.dispose` or
 * `Symbol.asyncDispose` method.
 *
 * It is called once for each attempt to connect, inside the task that connects.
 * `signal` aborts when the attempt is cancelled. An opener that ignores it is
 * waited for, and what it then returns is closed.
 *
 * An opener must not wait for `get()` in its own task, nor for the disposal of
 * its `LazyConnection`: it would wait for itself.
 *
 * @example TLS
 *
 * Without the handshake, a wrong certificate would only surface at the first
 * write, and waiting for a server that never answers could not be cancelled.
 * `using` closes the socket if `Deno.startTls` fails, and does nothing once
 * `Deno.startTls` has taken the socket over. `caCerts` takes the PEM texts of
 * your own authorities.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const hostname = "example.com";
 * const lazy = new LazyConnection(async (signal) => {
 *   // Deno.connect() would lose a socket that opens just as its signal aborts
 *   const cancel = AbortSignal.any([signal]);
 *   cancel.throwIfAborted = () => {};
 *   using tcp = await Deno.connect({ hostname, port: 443, signal: cancel });
 *   const tls = await Deno.startTls(tcp, { hostname, caCerts: [] });
 *   try {
 *     signal.throwIfAborted();
 *     signal.onabort = () => tls.close();
 *     await tls.handshake();
 *     return tls;
 *   } catch (error) {
 *     tls[Symbol.dispose]();
 *     throw error;
 *   }
 * });
 * ```
 *
 * @example A Unix socket
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const path = "/run/redis/redis-server.sock";
 * const lazy = new LazyConnection(() =>
 *   Deno.connect({ transport: "unix", path })
 * );
 * ```
 *
 * @example A client without `Symbol.dispose`, such as that of `npm:pg`
 * ```ts ignore
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * // @ts-types="npm:@types/pg@^8"
 * import pg from "npm:pg@^8";
 *
 * const lazy = new LazyConnection(async () => {
 *   const client = new pg.Client({ connectionTimeoutMillis: 5_000 });
 *   client.on("error", console.error); // or an error ends the process
 *   await client.connect();
 *   return Object.assign(client, {
 *     [Symbol.asyncDispose]: () => client.end(),
 *   });
 * });
 * ```
 *
 * @typeParam C The type of the connection.
 * @param signal Aborts when the attempt is cancelled, and never once the
 * connection is open.
 * @returns The connection, one that no other task has.
 */
export type Opener<C extends Disposable | AsyncDisposable> = (
  signal: AbortSignal,
) => C | PromiseLike<C>;

/**
 * One object for many tasks, each of which has a connection of its own.
 *
 * A *task* is a call of `run()`, with everything that it starts; code outside
 * of any `run()` is in the *main task*. A task has at most one connection. It is
 * the task's until it is *disposed of*: by `using`, by `await using`, by a call
 * of `[Symbol.dispose]()` or `[Symbol.asyncDispose]()`, by the end of its task,
 * or by the disposal of the `LazyConnection`. Nothing else counts: `close()`,
 * `end()` and the like are the object's own business.
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
 *   await using conn = await lazy.connect(); // this task's own connection
 *   return conn.localAddr.port;
 * } // closed here
 *
 * const [a, b] = await Promise.all([lazy.run(localPort), lazy.run(localPort)]);
 * assertNotEquals(a, b);
 * ```
 *
 * @typeParam C The type of the connection.
 */
export class LazyConnection<
  C extends Disposable | AsyncDisposable = Deno.TcpConn,
> implements AsyncDisposable {
  readonly #opener: Opener<C>;
  readonly #signal: AbortSignal | undefined;
  readonly #tasks = new AsyncLocalStorage<Task<C>>();
  readonly #main = new Task<C>(this.#tasks);
  /** The tasks that are not free. */
  readonly #connected = new Set<Task<C>>();
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
   * const lazy = new LazyConnection(() => Deno.open("data.csv"));
   * ```
   *
   * @param target What to connect to: the options of `Deno.connect`, or an
   * opener. The `signal` of the options cancels every attempt to connect, but
   * closes no open connection.
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
    this.#opener = async (signal) => {
      // Deno.connect() calls this last. If it threw, a socket that opened just
      // as the signal aborted would be lost; so #open() gets it, and closes it.
      signal.throwIfAborted = () => {};
      const conn = await Deno.connect({ ...options, signal });
      // An own property even before it is replaced, since to delete one after
      // closing takes longer than all else that is done to the object
      const { [Symbol.dispose]: dispose } = conn;
      conn[Symbol.dispose] = dispose;
      return conn as Disposable as C; // so says the type of `target`
    };
  }

  /**
   * The current task's open connection, or `undefined`. It opens nothing: see
   * `get()` for that.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertStrictEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * await using lazy = new LazyConnection({ port: server.addr.port });
   *
   * await lazy.run(async () => {
   *   assertEquals(lazy.current, undefined);
   *   await using conn = await lazy.connect();
   *   assertStrictEquals(lazy.current, conn);
   * });
   * ```
   *
   * @returns The connection, or `undefined` if the task has none open.
   */
  get current(): (C & AsyncDisposable) | undefined {
    const { connection } = this.#task;
    return connection?.state === "open" ? connection.conn : undefined;
  }

  get #task(): Task<C> {
    return this.#tasks.getStore() ?? this.#main;
  }

  /**
   * Calls a function as a task of its own: the counterpart of starting a
   * thread.
   *
   * When the function's promise settles, the task ends: an attempt to connect
   * is cancelled and waited for, an open connection is closed inside the task,
   * and then `run` settles. Whatever outlives the function, such as a stream or
   * a generator, then loses its connection.
   *
   * A `run` inside a task starts another task.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * await using lazy = new LazyConnection({ port: server.addr.port });
   *
   * const port = await lazy.run(async () => {
   *   const conn = await lazy.get();
   *   return conn.remoteAddr.port;
   * }); // closed here
   * assertEquals(port, server.addr.port);
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R What the function returns.
   * @param callback The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {Deno.errors.BadResource} If the `LazyConnection` has been disposed
   * of; the function is then not called.
   * @throws {SuppressedError} If the function fails and so does closing the
   * connection: `suppressed` is the function's error, `error` that of closing.
   */
  async run<A extends unknown[], R>(
    callback: (...args: A) => R,
    ...args: A
  ): Promise<Awaited<R>> {
    if (this.#disposed) throw new BadResource(`Cannot run a task: ${DISPOSED}`);
    await using task = new Task<C>(this.#tasks);
    return await this.#tasks.run(task, call, callback, args);
  }

  /**
   * Gets the current task's connection: the open one, else the one that is
   * being opened, whoever began that, else a new one.
   *
   * However deep in the call stack it is asked for, and by however many at
   * once, the task opens one connection. The end of the task closes it; keep
   * `using` for what you `connect()`.
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
   * @returns The connection, made `AsyncDisposable`.
   * @throws {Deno.errors.AlreadyExists} If the task's connection is closing, or
   * in the opener itself.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of.
   * @throws {Deno.errors.Busy} If the opener returns what is still another
   * task's connection.
   * @throws {SuppressedError} If closing a connection that is not handed out
   * fails: `suppressed` is the reason for closing it, `error` that of closing.
   * @throws {TypeError} If the opener returns something that cannot be disposed
   * of, or whose methods cannot be replaced.
   */
  get(): Promise<C & AsyncDisposable> {
    const task = this.#task;
    return this.#refusal(task) ?? task.connection?.opened ?? this.connect();
  }

  /**
   * Opens the current task's connection, or rejects if there is one.
   *
   * The connection is the very object that the opener returned. Until it is
   * disposed of, its `Symbol.dispose` and `Symbol.asyncDispose` methods are
   * replaced by ones that also free the task for another `connect()`. The
   * object has its own methods back when closing starts, and keeps a
   * `Symbol.asyncDispose` if it had none. A `using` that was declared before
   * then and ends later does nothing.
   *
   * @example A time-out, in milliseconds
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * const lazy = new LazyConnection<Deno.TcpConn>((signal) =>
   *   new Promise((_resolve, reject) => { // never answers
   *     signal.onabort = () => reject(signal.reason);
   *   })
   * );
   *
   * const error = await assertRejects(
   *   () => lazy.connect({ signal: AbortSignal.timeout(100) }),
   *   DOMException,
   * );
   * assertEquals(error.name, "TimeoutError");
   * ```
   *
   * @param options The options of this attempt.
   * @param options.signal Cancels the attempt, which then rejects with the
   * signal's `reason`. It has no effect once the connection is open.
   * @returns The connection, made `AsyncDisposable`.
   * @throws {Deno.errors.AlreadyExists} If the task has a connection, be it
   * opening, open or closing.
   * @throws {Deno.errors.BadResource} If the task has ended or the
   * `LazyConnection` has been disposed of, before the call or while it opens
   * the connection.
   * @throws {Deno.errors.Busy} If the opener returns what is still another
   * task's connection.
   * @throws {SuppressedError} If closing a connection that is not handed out
   * fails: `suppressed` is the reason for closing it, `error` that of closing.
   * @throws {TypeError} If the opener returns something that cannot be disposed
   * of, or whose methods cannot be replaced.
   */
  connect(
    { signal }: { signal?: AbortSignal | undefined } = {},
  ): Promise<C & AsyncDisposable> {
    const task = this.#task;
    const refusal = this.#refusal(task);
    if (refusal) return refusal;
    if (task.connection) {
      return Promise.reject(new AlreadyExists(`Cannot connect: ${CONNECTED}`));
    }
    const connection = new Connection<C>(() => {
      task.connection = undefined;
      this.#connected.delete(task);
    });
    task.connection = connection;
    this.#connected.add(task);
    return connection.opened = this.#open(connection, signal);
  }

  #refusal(task: Task<C>): Promise<never> | undefined {
    if (!this.#disposed && !task.ended) return;
    const why = this.#disposed ? DISPOSED : ENDED;
    return Promise.reject(new BadResource(`Cannot connect: ${why}`));
  }

  async #open(
    connection: Connection<C>,
    signal: AbortSignal | undefined,
  ): Promise<C & AsyncDisposable> {
    const { attempt } = connection;
    const given = signal ?? this.#signal;
    let cancel: AbortSignal | undefined;
    const abort = () => attempt.abort(cancel?.reason);
    try {
      // Not the given signal itself: an EventTarget searches all its listeners
      // whenever one is added or removed, and many attempts may share a signal.
      cancel = given && AbortSignal.any([given, this.#signal ?? given]);
      cancel?.throwIfAborted();
      cancel?.addEventListener("abort", abort);
      const opened = await this.#opener(attempt.signal);
      // A pool may give an object on from within its disposal, about to settle
      if (held.has(opened)) await new Promise((resolve) => setTimeout(resolve));
      const conn = connection.hold(opened);
      // Not throwIfAborted(), which may have been replaced above
      if (attempt.signal.aborted) throw attempt.signal.reason;
      connection.state = "open";
      return conn;
    } catch (error) {
      await using _connection = connection; // closes what is not handed out
      throw attempt.signal.aborted ? attempt.signal.reason : error;
    } finally {
      cancel?.removeEventListener("abort", abort);
    }
  }

  /**
   * Closes every task's connection, cancels every attempt to connect, and
   * refuses whatever comes later. It waits for that, but not for tasks to end;
   * an opener or a connection's own disposal must not wait for it in turn.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: server.addr.port });
   * {
   *   await using _lazy = lazy;
   *   await lazy.get();
   * } // closed here
   * assertEquals(lazy.current, undefined);
   * await assertRejects(() => lazy.get(), Deno.errors.BadResource);
   * ```
   *
   * @returns A promise that resolves once nothing is open.
   * @throws {SuppressedError} If closing fails for several connections, as with
   * several `await using`; the error itself, if it fails for one.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    await using ends = new AsyncDisposableStack();
    for (const task of this.#connected) {
      const end = task.disconnect(DISPOSED);
      end.catch(() => {}); // reported by the stack, which gets to it later
      ends.defer(() => end);
    }
  }
}

/** Calls a function and, in the same context, a thenable that it returns. */
function call<A extends unknown[], R>(
  callback: (...args: A) => R,
  args: A,
): Promise<Awaited<R>> {
  return Promise.resolve(callback(...args));
}

/** A call of `run()`, or all that is outside of any. */
class Task<C extends Disposable | AsyncDisposable> implements AsyncDisposable {
  connection: Connection<C> | undefined;
  ended = false;
  readonly #tasks: AsyncLocalStorage<Task<C>>;

  constructor(tasks: AsyncLocalStorage<Task<C>>) {
    this.#tasks = tasks;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.ended = true;
    await this.disconnect(ENDED);
  }

  /** Ends its connection, inside the task, and waits for that. */
  async disconnect(why: string): Promise<void> {
    const { connection } = this;
    if (connection) await this.#tasks.run(this, () => connection.end(why));
  }
}

/** The objects that are some task's connection, of any LazyConnection. */
const held = new WeakSet<WeakKey>();

/** A task's connection, from the call of `connect()` until the task is free. */
class Connection<C extends Disposable | AsyncDisposable>
  implements AsyncDisposable {
  state: "opening" | "open" | "closing" = "opening";
  readonly attempt = new AbortController();
  /** What `connect()` and `get()` return, until closing starts. */
  opened: Promise<C & AsyncDisposable> | undefined;
  /** What the opener returned. */
  conn: (C & AsyncDisposable) | undefined;
  #ownDisposal: Method | undefined;
  readonly #putBack: (() => void)[] = [];
  readonly #free: () => void;
  #freed: PromiseWithResolvers<void> | undefined;

  constructor(free: () => void) {
    this.#free = free;
  }

  /** Replaces the object's own methods, both or none, until closing starts. */
  hold(conn: C): C & AsyncDisposable {
    if (held.has(conn)) throw new Busy(`Cannot connect: ${HELD}`);
    try {
      held.add(conn);
      this.conn = conn as C & AsyncDisposable; // once it is made one, below
      const object: Methods = conn;
      let dispose: Method | undefined;
      try {
        dispose = this.#ownDisposal = methodOf(object, Symbol.dispose);
      } finally { // even if that getter throws, the other method may close it
        this.#ownDisposal = methodOf(object, Symbol.asyncDispose) ?? dispose;
      }
      if (!this.#ownDisposal) throw new TypeError("It has neither method");
      if (dispose) {
        this.#replace(object, Symbol.dispose, () => {
          if (!this.#startClosing()) return;
          try {
            dispose.call(conn);
          } finally {
            this.#finishClosing();
          }
        });
      }
      object[Symbol.asyncDispose] ??= disposeAsync;
      const close = () => this[Symbol.asyncDispose]();
      this.#replace(object, Symbol.asyncDispose, close);
      return this.conn;
    } catch (cause) {
      throw new TypeError(`Cannot connect: ${NOT_DISPOSABLE}`, { cause });
    }
  }

  #replace(object: Methods, key: keyof Methods, method: Method): void {
    const own = Object.hasOwn(object, key);
    const was = object[key];
    object[key] = method;
    this.#putBack.push(() => {
      // A deletion makes an object slower, but it has no key that it had not
      if (!own) delete object[key];
      if (object[key] !== was) object[key] = was;
    });
    if (object[key] !== method) throw new TypeError("Its setter has no effect");
  }

  /** Closes it or cancels the attempt, and waits until the task is free. */
  async end(why: string): Promise<void> {
    if (this.state === "open") return await this[Symbol.asyncDispose]();
    if (this.state === "opening") {
      this.attempt.abort(new BadResource(`Cannot connect: ${why}`));
    }
    this.#freed ??= Promise.withResolvers();
    await this.#freed.promise;
  }

  /** Closes what the opener returned, if anything, and frees the task. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#startClosing()) return;
    try {
      if (this.#ownDisposal) await this.#ownDisposal.call(this.conn);
    } finally {
      this.#finishClosing();
    }
  }

  /** Gives the object its own methods back, the first time only. */
  #startClosing(): boolean {
    if (this.state === "closing") return false;
    this.state = "closing";
    this.opened = undefined;
    for (const putBack of this.#putBack) {
      try {
        putBack();
      } catch {
        // An object that has been frozen since is closed as it is
      }
    }
    return true;
  }

  #finishClosing(): void {
    if (this.conn) held.delete(this.conn);
    this.#free();
    this.#freed?.resolve();
  }
}

/** The methods that dispose of an object. */
interface Methods {
  [Symbol.dispose]?: Method | undefined;
  [Symbol.asyncDispose]?: Method | undefined;
}
type Method = () => unknown;

function methodOf(object: Methods, key: keyof Methods): Method | undefined {
  const method = object[key];
  if (!method || typeof method === "function") return method;
  throw new TypeError(`Its ${String(key)} is not a function`);
}

/** What `await using` does where there is no more than `Symbol.dispose`. */
async function disposeAsync(this: Methods): Promise<void> {
  await this[Symbol.dispose]?.();
}
