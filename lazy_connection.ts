// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";

const { AlreadyExists, BadResource, Busy } = Deno.errors;
const CONNECTED = "the task is already connected, " +
  "close that connection first or start another task with run()";
const DISPOSED = "the LazyConnection has been disposed of";
const ENDED = "the task has ended, start another one with run()";
const HELD = "the opener gave what is still another task's connection";
const NOT_DISPOSABLE = "the opener gave nothing that can be disposed of";

/**
 * Opens a connection: anything that is `Disposable` or `AsyncDisposable`.
 *
 * It is called once for each attempt, inside the task that connects. `signal`
 * aborts when the attempt is given up: an opener that heeds it gives up at
 * once, one that ignores it is waited for, and what it then gives is closed.
 *
 * @example TLS
 *
 * `using` closes the socket where `Deno.startTls` fails, and does nothing where
 * it has taken the socket over.
 *
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const hostname = "example.com";
 * const lazy = new LazyConnection(async (signal) => {
 *   using tcp = await Deno.connect({ hostname, port: 443, signal });
 *   return await Deno.startTls(tcp, { hostname });
 * });
 * ```
 *
 * @example A Unix socket
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * const path = "/run/postgresql/.s.PGSQL.5432";
 * const lazy = new LazyConnection(() =>
 *   Deno.connect({ transport: "unix", path })
 * );
 * ```
 *
 * @example A client that has only `Symbol.asyncDispose`
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 *
 * class Client implements AsyncDisposable {
 *   static async open(_url: string, signal: AbortSignal): Promise<Client> {
 *     await Promise.resolve(); // the handshake
 *     signal.throwIfAborted();
 *     return new Client();
 *   }
 *   async [Symbol.asyncDispose](): Promise<void> {}
 * }
 *
 * const lazy = new LazyConnection((signal) => Client.open("db://a", signal));
 *
 * await lazy.run(async () => {
 *   await using _client = await lazy.connect();
 * });
 * ```
 *
 * @typeParam C The type of the connection.
 * @param signal Aborts when the attempt is given up.
 * @returns The connection, one that no other task has.
 */
export type Opener<C extends Disposable | AsyncDisposable> = (
  signal: AbortSignal,
) => Promise<C>;

/**
 * One object for many tasks, each of which has a connection of its own.
 *
 * A *task* is a call of {@linkcode LazyConnection.prototype.run}, with all that
 * it starts; code outside of any `run` is in the *main task*. A task has at
 * most one connection, from the call of
 * {@linkcode LazyConnection.prototype.connect} until it is closed, and no task
 * sees, uses or closes another's.
 *
 * @example Two tasks, two connections
 * ```ts
 * import { LazyConnection } from "@cookbook/lazy-connection";
 * import { assertNotEquals } from "@std/assert";
 *
 * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const lazy = new LazyConnection({ port: server.addr.port });
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
  readonly #main = new Task<C>();
  readonly #connections = new Set<Connection<C>>();
  #disposed = false;

  /**
   * Creates an object that opens nothing yet, and needs no permission to.
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
   * @param target What to connect to: the options of `Deno.connect`, whose
   * `signal` gives up each attempt, or an {@linkcode Opener}. Options are taken
   * only where a `Deno.TcpConn` is a `C`.
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
    this.#opener = (signal) => {
      // Deno.connect() calls this last. Where it throws, a socket that opened
      // just as the signal aborted is lost; now connect() gets it, to close it.
      signal.throwIfAborted = () => {};
      const opening: Promise<unknown> = Deno.connect({ ...options, signal });
      return opening as Promise<C>; // so says the type of `target`
    };
  }

  /**
   * The current task's open connection, or `undefined`: what code deep in the
   * call stack uses in place of a parameter.
   *
   * @example Usage
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertStrictEquals } from "@std/assert";
   *
   * using server = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: server.addr.port });
   *
   * await lazy.run(async () => {
   *   assertEquals(lazy.current, undefined);
   *   await using conn = await lazy.connect();
   *   assertStrictEquals(lazy.current, conn);
   * });
   * ```
   *
   * @returns The connection, or `undefined` where the task has none open.
   */
  get current(): (C & AsyncDisposable) | undefined {
    return this.#task.connection?.open;
  }

  get #task(): Task<C> {
    return this.#tasks.getStore() ?? this.#main;
  }

  /**
   * Calls a function as a task of its own: the counterpart of starting a
   * thread.
   *
   * When the task settles, a connect still in flight is given up and waited
   * for, and a connection still open is closed; then `run` settles. A `run`
   * inside a task starts another task.
   *
   * @example A server in which each request is a task
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals } from "@std/assert";
   *
   * using database = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const lazy = new LazyConnection({ port: database.addr.port });
   *
   * async function handle(request: Request) {
   *   await using conn = await lazy.connect();
   *   return new Response(`${request.method} used ${conn.localAddr.transport}`);
   * }
   *
   * await using server = Deno.serve(
   *   { hostname: "127.0.0.1", port: 0 },
   *   (request) => lazy.run(handle, request),
   * );
   * const response = await fetch(`http://127.0.0.1:${server.addr.port}`);
   * assertEquals(await response.text(), "GET used tcp");
   * ```
   *
   * @typeParam A The types of the arguments.
   * @typeParam R The type of the result.
   * @param task The function to call; it may be synchronous.
   * @param args The arguments to call it with.
   * @returns The function's result.
   * @throws {Deno.errors.BadResource} If the object has been disposed of; the
   * function is then not called.
   * @throws {SuppressedError} If the task fails and so does closing its
   * connection: `suppressed` is the task's error, `error` the other one.
   */
  async run<A extends unknown[], R>(
    task: (...args: A) => R | PromiseLike<R>,
    ...args: A
  ): Promise<R> {
    if (this.#disposed) throw new BadResource(`Cannot run a task: ${DISPOSED}`);
    const own = new Task<C>();
    try {
      return await this.#tasks.run(own, task, ...args);
    } catch (error) {
      await using _own = own; // keeps the error where closing fails too
      throw error;
    } finally {
      await own[Symbol.asyncDispose]();
    }
  }

  /**
   * Opens the current task's connection.
   *
   * The connection is the very object that the opener gave. `using`,
   * `await using` and its own `close()`, if it has one, each close it and free
   * the task for another `connect`: until then, the object's methods of that
   * name are replaced by ones that call them.
   *
   * @example A time-out, in milliseconds
   * ```ts
   * import { LazyConnection } from "@cookbook/lazy-connection";
   * import { assertEquals, assertRejects } from "@std/assert";
   *
   * const lazy = new LazyConnection<Deno.TcpConn>((signal) =>
   *   new Promise((_resolve, reject) => { // never answers
   *     signal.addEventListener("abort", () => reject(signal.reason));
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
   * @param options.signal Gives up the attempt, with its own reason. It has no
   * say once the connection is open.
   * @returns The connection, made `AsyncDisposable`.
   * @throws {Deno.errors.AlreadyExists} If the task has a connection, be it
   * opening, open or closing.
   * @throws {Deno.errors.BadResource} If the task has ended or the object has
   * been disposed of, before the call or while it opens the connection.
   * @throws {Deno.errors.Busy} If the opener gives what is still another task's
   * connection.
   * @throws {SuppressedError} If a connection comes too late and closing it
   * fails: `suppressed` is the reason for giving up, `error` the other one.
   */
  async connect(
    { signal }: { signal?: AbortSignal } = {},
  ): Promise<C & AsyncDisposable> {
    const task = this.#task;
    if (this.#disposed) throw new BadResource(`Cannot connect: ${DISPOSED}`);
    if (task.ended) throw new BadResource(`Cannot connect: ${ENDED}`);
    if (task.connection) {
      throw new AlreadyExists(`Cannot connect: ${CONNECTED}`);
    }
    signal?.throwIfAborted();
    this.#signal?.throwIfAborted();

    const connection: Connection<C> = new Connection(task, this.#connections);
    const attempt = connection.opening = new AbortController();
    function giveUp(this: AbortSignal) {
      attempt.abort(this.reason);
    }
    try {
      signal?.addEventListener("abort", giveUp);
      this.#signal?.addEventListener("abort", giveUp);
      const conn = await this.#opener(attempt.signal);
      connection.hold(conn);
      if (attempt.signal.aborted) throw attempt.signal.reason;
      connection.opening = undefined;
      return connection.open = conn;
    } catch (error) {
      await using _connection = connection; // closes what is not handed out
      throw attempt.signal.aborted ? attempt.signal.reason : error;
    } finally {
      signal?.removeEventListener("abort", giveUp);
      this.#signal?.removeEventListener("abort", giveUp);
    }
  }

  /**
   * Closes every task's connection, gives up every connect in flight, and
   * refuses whatever comes later. It waits for all of them, but for no task.
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
   *   await lazy.connect();
   * }
   * assertEquals(lazy.current, undefined);
   * await assertRejects(() => lazy.connect(), Deno.errors.BadResource);
   * ```
   *
   * @returns A promise that resolves once nothing is open.
   * @throws {SuppressedError} If closing fails for several connections, as with
   * several `await using`; the error itself, if it fails for one.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    await using ends = new AsyncDisposableStack();
    for (const connection of this.#connections) {
      const end = connection.end(DISPOSED);
      end.catch(() => {}); // reported by the stack, which gets to it later
      ends.defer(() => end);
    }
  }
}

class Task<C extends Disposable | AsyncDisposable> implements AsyncDisposable {
  ended = false;
  connection: Connection<C> | undefined;

  async [Symbol.asyncDispose](): Promise<void> {
    this.ended = true;
    if (this.connection) await this.connection.end(ENDED);
  }
}

/** The ways of closing that an opener's object may have. */
type Closable = Partial<
  { close(...args: unknown[]): unknown } & Disposable & AsyncDisposable
>;

/** A task's connection, from the call of `connect()` until it is closed. */
class Connection<C extends Disposable | AsyncDisposable>
  implements AsyncDisposable {
  /** The objects that are some task's connection. */
  static readonly #held = new WeakSet<WeakKey>();
  /** Set while it is opening. */
  opening: AbortController | undefined;
  /** Set while it is open. With neither of the two it is closing. */
  open: (C & AsyncDisposable) | undefined;
  #dispose: (() => unknown) | undefined;
  #restore: (() => void) | undefined;
  #freed: PromiseWithResolvers<void> | undefined;
  readonly #task: Task<C>;
  readonly #all: Set<Connection<C>>;

  constructor(task: Task<C>, all: Set<Connection<C>>) {
    this.#task = task;
    this.#all = all;
    task.connection = this;
    all.add(this);
  }

  /** Has the object's own ways of closing it free the task while it is held. */
  hold(conn: C): asserts conn is C & AsyncDisposable {
    if (Connection.#held.has(conn)) throw new Busy(`Cannot connect: ${HELD}`);
    const closable: Closable = conn;
    const {
      [Symbol.dispose]: dispose,
      [Symbol.asyncDispose]: asyncDispose,
    } = closable;
    const close = typeof closable.close === "function" && closable.close;
    const disposer = asyncDispose ?? dispose;
    if (!disposer) throw new TypeError(`Cannot connect: ${NOT_DISPOSABLE}`);
    const ownDispose = this.#dispose = () => disposer.call(conn);

    const disposeAsync = async () => void await this.#close(ownDispose);
    let disposal: Promise<void> | undefined;
    closable[Symbol.asyncDispose] = () => disposal ??= disposeAsync();
    if (dispose) {
      closable[Symbol.dispose] = () => this.#close(() => dispose.call(conn));
    }
    if (close) {
      closable.close = (...args) => this.#close(() => close.apply(conn, args));
    }
    Connection.#held.add(conn);
    this.#restore = () => {
      Connection.#held.delete(conn);
      closable[Symbol.asyncDispose] = asyncDispose ??
        (async () => await ownDispose());
      if (dispose) closable[Symbol.dispose] = dispose;
      if (close) closable.close = close;
    };
  }

  /** Closes it or gives it up, and waits until the task is free. */
  async end(why: string): Promise<void> {
    if (this.open) return await this.open[Symbol.asyncDispose]();
    this.opening?.abort(new BadResource(`Cannot connect: ${why}`));
    this.#freed ??= Promise.withResolvers();
    await this.#freed.promise;
  }

  /** Closes what the opener gave, if it did, and frees the task. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#settle(() => this.#dispose?.());
  }

  #close(method: () => unknown): unknown {
    // Too late, as `using` can be: the object may be another's by now
    if (this.#task.connection !== this) return;
    // The object, as it closes, calls one of its methods from another
    if (!this.open) return method();
    this.open = undefined;
    let closing: unknown;
    try {
      closing = method();
    } catch (error) {
      this.#free();
      throw error;
    }
    if (closing instanceof Object && "then" in closing) {
      return this.#settle(() => closing);
    }
    this.#free();
    return closing;
  }

  async #settle(closing: () => unknown): Promise<unknown> {
    try {
      return await closing();
    } finally {
      this.#free();
    }
  }

  #free(): void {
    this.#task.connection = undefined;
    this.#all.delete(this);
    this.#freed?.resolve();
    this.#restore?.();
  }
}
