// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertNotEquals,
  assertRejects,
  assertStrictEquals,
  assertThrows,
} from "@std/assert";
import { delay } from "@std/async/delay";
import { main } from "./demo.ts";
import { LazyConnection, type Opener } from "./mod.ts";

const { AlreadyExists, BadResource, Busy } = Deno.errors;
const CONNECTED =
  "Cannot connect: the task is already connected or connecting, dispose of " +
  "that connection first (leave its `using` block) or start another task " +
  "with run()";
const DISPOSED = "Cannot connect: the LazyConnection has been disposed of";
const ENDED =
  "Cannot connect: the task has ended, start another one with run()";
const HELD =
  "Cannot connect: the opener gave what is still another task's connection";
const NOT_DISPOSABLE = "Cannot connect: the opener must give an object whose " +
  "`Symbol.dispose` or `Symbol.asyncDispose` method can be replaced";
const loopback = { hostname: "127.0.0.1", port: 0 };
const net = Deno.permissions.querySync({ name: "net", host: "127.0.0.1" });

// Helpers

type Test = (t: Deno.TestContext) => void | Promise<void>;

function test(name: string, fn: Test, ignore = false) {
  Deno.test({ name, fn, ignore, sanitizeOps: true, sanitizeResources: true });
}

function netTest(name: string, fn: Test) {
  test(name, fn, net.state !== "granted");
}

/** A connection with both methods, which logs the calls of each. */
class Fake implements Disposable, AsyncDisposable {
  calls: string[] = [];
  [Symbol.dispose]() {
    this.calls.push("dispose");
  }
  [Symbol.asyncDispose]() {
    this.calls.push("asyncDispose");
    return Promise.resolve();
  }
}

/** A connection that closes when the test says so. */
class Slow implements AsyncDisposable {
  readonly closing = Promise.withResolvers<void>();
  closings = 0;
  [Symbol.asyncDispose]() {
    this.closings++;
    return this.closing.promise;
  }
}

/** A connection that fails to close. */
class Stuck implements AsyncDisposable {
  readonly error = new Error("stuck");
  [Symbol.asyncDispose]() {
    return Promise.reject(this.error);
  }
}

/** An opener that answers when the test does. */
class Control<C extends Disposable | AsyncDisposable = Fake> {
  readonly lazy: LazyConnection<C> = new LazyConnection((signal) => {
    this.calls++;
    this.signal = signal;
    this.answer = Promise.withResolvers();
    return this.answer.promise;
  });
  calls = 0;
  /** Of the last call, as is the answer. */
  signal = AbortSignal.any([]);
  answer = Promise.withResolvers<C>();
}

/** Rejects once the signal aborts, and only then. */
function never(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
}

/** Whether the promise is pending once all others have settled that can. */
async function isPending(promise: Promise<unknown>): Promise<boolean> {
  let pending = true;
  const settle = () => pending = false;
  promise.then(settle, settle);
  await settled();
  return pending;
}

/**
 * Lets all promises settle that can: no chain of ours is longer than twenty
 * microtasks, which a test of every delay up to there shows.
 */
async function settled(ticks = 50): Promise<void> {
  for (let i = 0; i < ticks; i++) await null;
}

/** Opens and closes a connection in the current task, to show that it is free. */
async function assertFree(lazy: LazyConnection<Disposable>): Promise<void> {
  assertEquals(lazy.current, undefined);
  using conn = await lazy.connect();
  assertStrictEquals(lazy.current, conn);
}

/** Has `Deno.connect` replaced until the end of the block. */
function stubConnect(
  connect: (options: Deno.ConnectOptions) => Promise<Deno.TcpConn>,
): Disposable {
  const original = Deno.connect;
  // It has overloads that no arrow function has
  Deno.connect = connect as typeof Deno.connect;
  return { [Symbol.dispose]: () => Deno.connect = original };
}

// The constructor

test("LazyConnection constructor opens nothing", () => {
  const control = new Control();
  assertEquals(control.calls, 0);
  assertEquals(control.lazy.current, undefined);
  assertEquals(new LazyConnection({ port: 1 }).current, undefined);
});

test("LazyConnection constructor infers the connection from its target", () => {
  const fromOptions: LazyConnection<Deno.TcpConn> = new LazyConnection(
    loopback,
  );
  const fromOpener: LazyConnection<Deno.FsFile> = new LazyConnection(() =>
    Deno.open("never")
  );
  const fromSync: LazyConnection<Fake> = new LazyConnection(() => new Fake());
  const like: PromiseLike<Fake> = Promise.resolve(new Fake());
  const fromLike: LazyConnection<Fake> = new LazyConnection(() => like);
  // @ts-expect-error options give a TcpConn
  const wrong = new LazyConnection<Deno.TlsConn>(loopback);
  // @ts-expect-error an opener gives what can be disposed of
  const worse = new LazyConnection(() => Promise.resolve("text"));
  const all = [fromOptions, fromOpener, fromSync, fromLike, wrong, worse];
  for (const lazy of all) assertEquals(lazy.current, undefined);
});

test("LazyConnection constructor copies its options", async () => {
  const ports: number[] = [];
  using _stub = stubConnect((options) => {
    ports.push(options.port);
    return Promise.reject(new Error("no"));
  });
  const options = { port: 1 };
  const lazy = new LazyConnection(options);
  options.port = 2;
  await assertRejects(() => lazy.connect(), Error, "no");
  assertEquals(ports, [1]);
});

// Tasks

test("LazyConnection.run() resolves to the result of the function", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const sync: number = await lazy.run((a: number, b: number) => a + b, 1, 2);
  const async: string = await lazy.run((a: string) => Promise.resolve(a), "a");
  const either: number | string = await lazy.run(() =>
    sync > 9 ? 1 : Promise.resolve("b")
  );
  assertEquals([sync, async, either], [3, "a", "b"]);
});

test("LazyConnection.run() runs a lazy thenable inside the task", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const query: PromiseLike<Fake> = {
    then: (...args) => lazy.get().then(...args),
  };
  const conn = await lazy.run(() => query);
  assertEquals(conn.calls, ["asyncDispose"]);
  assertEquals(lazy.current, undefined);
});

test("LazyConnection.run() rejects with the error of the function", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const error = new Error("task");
  const thrown = lazy.run(() => {
    throw error;
  });
  assertStrictEquals(await assertRejects(() => thrown), error);
  const rejected = lazy.run(() => Promise.reject(error));
  assertStrictEquals(await assertRejects(() => rejected), error);
});

test("LazyConnection.run() gives each task a connection of its own", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const main = await lazy.connect();
  const task = async () => {
    assertEquals(lazy.current, undefined);
    const conn = await lazy.connect();
    await delay(1);
    assertStrictEquals(lazy.current, conn);
    return conn;
  };
  const [a, b] = await Promise.all([lazy.run(task), lazy.run(task)]);
  assertEquals(new Set([main, a, b]).size, 3);
  assertStrictEquals(lazy.current, main);
  assertEquals(main.calls, []);
});

test("LazyConnection.run() starts another task inside a task", async () => {
  const lazy = new LazyConnection(() => new Fake());
  await lazy.run(async () => {
    const outer = await lazy.connect();
    const inner = await lazy.run(async () => {
      assertEquals(lazy.current, undefined);
      return await lazy.connect();
    });
    assertEquals(inner.calls, ["asyncDispose"]);
    assertStrictEquals(lazy.current, outer);
    assertEquals(outer.calls, []);
  });
});

test("LazyConnection.run() is one task with what it starts", async () => {
  const lazy = new LazyConnection(() => new Fake());
  await lazy.run(async () => {
    const conn = await lazy.connect();
    const seen = await Promise.all([
      delay(1).then(() => lazy.current),
      new Promise((resolve) => setTimeout(() => resolve(lazy.current), 1)),
      new Promise((resolve) => queueMicrotask(() => resolve(lazy.current))),
      (async () => await lazy.current)(),
    ]);
    for (const current of seen) assertStrictEquals(current, conn);
  });
});

test("LazyConnection.run() is not the task of a listener that another dispatches to", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const target = new EventTarget();
  const seen: unknown[] = [];
  await lazy.run(async () => {
    await lazy.connect();
    target.addEventListener("a", () => seen.push(lazy.current));
  });
  target.dispatchEvent(new Event("a"));
  const conn = await lazy.run(async () => {
    const conn = await lazy.connect();
    target.dispatchEvent(new Event("a"));
    return conn;
  });
  assertEquals(seen.length, 2);
  assertStrictEquals(seen[0], undefined);
  assertStrictEquals(seen[1], conn);
});

test("LazyConnection.run() closes an open connection, then settles", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => slow);
  const run = lazy.run(async () => {
    await lazy.connect();
    return "done";
  });
  assert(await isPending(run));
  assertEquals(slow.closings, 1);
  slow.closing.resolve();
  assertEquals(await run, "done");
});

test("LazyConnection.run() waits for a connection that is closing", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => slow);
  const run = lazy.run(async () => {
    const conn = await lazy.connect();
    conn[Symbol.asyncDispose]();
  });
  assert(await isPending(run));
  slow.closing.resolve();
  await run;
  assertEquals(slow.closings, 1);
});

test("LazyConnection.run() closes inside the task", async () => {
  const seen: unknown[] = [];
  const lazy: LazyConnection<AsyncDisposable> = new LazyConnection(() => ({
    async [Symbol.asyncDispose]() {
      seen.push(lazy.current);
      await assertRejects(() => lazy.connect(), BadResource, ENDED);
      await assertRejects(() => lazy.get(), BadResource, ENDED);
    },
  }));
  const main = await lazy.connect();
  await lazy.run(() => lazy.connect());
  assertEquals(seen, [undefined]);
  assertStrictEquals(lazy.current, main);
});

test("LazyConnection.run() cancels an attempt to connect, and waits for it", async () => {
  const control = new Control<Slow>();
  const { lazy } = control;
  let connect: Promise<unknown> | undefined;
  const run = lazy.run(() => {
    connect = assertRejects(() => lazy.connect(), BadResource, ENDED);
  });
  assert(await isPending(run));
  const { signal } = control;
  assertInstanceOf(signal.reason, BadResource);

  const late = new Slow();
  control.answer.resolve(late);
  assert(await isPending(run));
  assertEquals(late.closings, 1);
  late.closing.resolve();
  await run;
  assertStrictEquals(await connect, signal.reason);
});

test("LazyConnection.run() keeps the error of the function if closing fails too", async () => {
  const stuck = new Stuck();
  const lazy = new LazyConnection(() => stuck);
  const error = new Error("task");
  const both = await assertRejects(
    () =>
      lazy.run(async () => {
        await lazy.connect();
        throw error;
      }),
    SuppressedError,
  );
  assertStrictEquals(both.suppressed, error);
  assertStrictEquals(both.error, stuck.error);
});

test("LazyConnection.run() rejects if closing fails", async () => {
  const stuck = new Stuck();
  const lazy = new LazyConnection(() => stuck);
  const run = lazy.run(async () => void await lazy.connect());
  assertStrictEquals(await assertRejects(() => run), stuck.error);
});

test("LazyConnection.run() leaves nothing to what outlives it", async () => {
  const control = new Control();
  const { lazy } = control;
  const leftover = await lazy.run(() => AsyncLocalStorage.snapshot());
  for (const key of ["connect", "get"] as const) {
    await assertRejects(() => leftover(() => lazy[key]()), BadResource, ENDED);
  }
  assertEquals(leftover(() => lazy.current), undefined);
  assertEquals(control.calls, 0);
  assertEquals(await leftover(() => lazy.run(() => 1)), 1);
});

// connect()

test("LazyConnection.connect() works in the main task", async () => {
  const fake = new Fake();
  const lazy = new LazyConnection(() => fake);
  {
    await using conn = await lazy.connect();
    assertStrictEquals(conn, fake);
    assertStrictEquals(lazy.current, fake);
  }
  assertEquals(lazy.current, undefined);
});

test("LazyConnection.connect() rejects when already connected or connecting", async () => {
  const control = new Control<Slow>();
  const { lazy } = control;
  const refused = () =>
    assertRejects(() => lazy.connect(), AlreadyExists, CONNECTED);
  const connect = lazy.connect();
  await refused(); // opening

  const slow = new Slow();
  control.answer.resolve(slow);
  const conn = await connect;
  await refused(); // open
  assertStrictEquals(lazy.current, slow);

  const closing = conn[Symbol.asyncDispose]();
  assertEquals(lazy.current, undefined);
  await refused(); // closing
  slow.closing.resolve();
  await closing;

  assertEquals(control.calls, 1);
  lazy.connect();
  assertEquals(control.calls, 2);
});

test("LazyConnection.connect() rejects in its opener and its disposal, run() does not", async () => {
  const errors: unknown[] = [];
  const inner = new Fake();
  const refused = async () => {
    assertEquals(lazy.current, undefined);
    errors.push(await assertRejects(() => lazy.get()));
    errors.push(await assertRejects(() => lazy.connect()));
  };
  let calls = 0;
  const lazy: LazyConnection<AsyncDisposable> = new LazyConnection(async () => {
    if (calls++ > 0) return inner;
    await refused();
    assertStrictEquals(await lazy.run(() => lazy.connect()), inner);
    return { [Symbol.asyncDispose]: refused };
  });
  {
    await using _conn = await lazy.connect();
  }
  assertEquals(errors.length, 4);
  for (const error of errors) assertInstanceOf(error, AlreadyExists);
  assertEquals(inner.calls, ["asyncDispose"]);
});

// get()

test("LazyConnection.get() opens one connection for all who ask", async () => {
  const control = new Control();
  const { lazy } = control;
  const fake = new Fake();
  await lazy.run(async () => {
    const deep = async () => await lazy.get();
    const gets = [lazy.get(), deep(), delay(0).then(() => lazy.get())];
    assertEquals(control.calls, 1);
    await delay(1);
    control.answer.resolve(fake);
    for (const conn of await Promise.all(gets)) assertStrictEquals(conn, fake);
    assertStrictEquals(await lazy.get(), fake); // the open one
    assertStrictEquals(lazy.current, fake);
    assertEquals(control.calls, 1);
    assertEquals(fake.calls, []);
  });
  assertEquals(fake.calls, ["asyncDispose"]);
});

test("LazyConnection.get() gives each task its own", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const [a, b, c] = await Promise.all([
    lazy.get(),
    lazy.run(() => lazy.get()),
    lazy.run(() => lazy.get()),
  ]);
  assertEquals(new Set([a, b, c]).size, 3);
});

test("LazyConnection.get() waits for what connect() opens", async () => {
  const control = new Control();
  const { lazy } = control;
  const connect = lazy.connect();
  const get = lazy.get();
  assertEquals(control.calls, 1);
  control.answer.resolve(new Fake());
  assertStrictEquals(await get, await connect);
});

test("LazyConnection.get() fails for all who wait, then tries again", async () => {
  const control = new Control();
  const { lazy } = control;
  const error = new Error("opener");
  const again = lazy.get().catch(() => lazy.get());
  const gets = [lazy.connect(), lazy.get(), lazy.get()].map((get) =>
    assertRejects(() => get)
  );
  control.answer.reject(error);
  const [refused, ...others] = await Promise.all(gets);
  assertInstanceOf(refused, AlreadyExists);
  for (const other of others) assertStrictEquals(other, error);
  assertEquals(control.calls, 2);
  const fake = new Fake();
  control.answer.resolve(fake);
  assertStrictEquals(await again, fake);
});

test("LazyConnection.get() fails each time if its opener throws", async () => {
  const errors = [new Error("first"), new Error("second")];
  const rest = errors.values();
  const lazy = new LazyConnection<Fake>(() => {
    throw rest.next().value;
  });
  const gets = errors.map(() => lazy.get());
  for (const [i, get] of gets.entries()) {
    assertStrictEquals(await assertRejects(() => get), errors[i]);
  }
});

test("LazyConnection.get() rejects for all with the reason for cancelling", async () => {
  const control = new Control();
  const { lazy } = control;
  const controller = new AbortController();
  const attempts = [lazy.connect(controller), lazy.get()];
  controller.abort("enough");
  attempts.push(lazy.get());
  control.answer.resolve(new Fake());
  for (const attempt of attempts) {
    assertEquals(await assertRejects(() => attempt), "enough");
  }
});

test("LazyConnection.get() rejects at once after the end of its task", async () => {
  const control = new Control();
  const { lazy } = control;
  let inTask = AsyncLocalStorage.snapshot();
  let waiting: Promise<unknown> | undefined;
  const run = lazy.run(() => {
    inTask = AsyncLocalStorage.snapshot();
    waiting = assertRejects(() => lazy.get(), BadResource, ENDED);
  });
  await settled(); // the task has ended, and its opener has not answered
  await assertRejects(() => inTask(() => lazy.get()), BadResource, ENDED);
  control.answer.reject(new Error("late"));
  await Promise.all([run, waiting]);
});

test("LazyConnection.get() rejects while the connection is closing", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => slow);
  const closing = (await lazy.get())[Symbol.asyncDispose]();
  await assertRejects(() => lazy.get(), AlreadyExists, CONNECTED);
  slow.closing.resolve();
  await closing;
  assertStrictEquals(await lazy.get(), slow);
});

test("LazyConnection.get() gives what is open, not what was", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const first = await lazy.get();
  await first[Symbol.asyncDispose]();
  const second = await lazy.get();
  assertNotEquals<unknown>(first.calls, second.calls);
  assertStrictEquals(await lazy.get(), second);
});

// Closing

test("LazyConnection.connect() is freed by each way to dispose of a connection", async (t) => {
  const ways: Record<string, (lazy: LazyConnection<Fake>) => Promise<Fake>> = {
    async "using"(lazy) {
      using conn = await lazy.connect();
      return conn;
    },
    async "await using"(lazy) {
      await using conn = await lazy.connect();
      return conn;
    },
    async "[Symbol.dispose]()"(lazy) {
      const conn = await lazy.connect();
      conn[Symbol.dispose]();
      return conn;
    },
    async "[Symbol.asyncDispose]()"(lazy) {
      const conn = await lazy.connect();
      await conn[Symbol.asyncDispose]();
      return conn;
    },
    async "the end of the task"(lazy) {
      return await lazy.run(() => lazy.connect());
    },
  };
  const calls = ["dispose", "asyncDispose", "dispose", "asyncDispose"];
  for (const [i, [name, close]] of Object.entries(ways).entries()) {
    await t.step(name, async () => {
      const lazy = new LazyConnection(() => new Fake());
      const conn = await close(lazy);
      assertEquals(conn.calls, [calls[i] ?? "asyncDispose"]);
      await assertFree(lazy);
    });
  }
});

test("LazyConnection.connect() leaves close() to the object", async (t) => {
  const error = new Error("unfinalized statements");
  const closes: Record<string, (...args: unknown[]) => unknown> = {
    "that returns": (...args) => args,
    "that throws": () => {
      throw error;
    },
    "that rejects": () => Promise.reject(error),
  };
  for (const [name, close] of Object.entries(closes)) {
    await t.step(name, async () => {
      let disposals = 0;
      const object = { close, [Symbol.dispose]: () => void disposals++ };
      const lazy = new LazyConnection(() => object);
      await lazy.run(async () => {
        await using conn = await lazy.connect();
        assertStrictEquals(conn.close, close);
        try {
          assertEquals(await conn.close("statement"), ["statement"]);
        } catch (caught) {
          assertStrictEquals(caught, error);
        }
        assertStrictEquals(lazy.current, conn);
        assertEquals(disposals, 0);
      });
      assertEquals(disposals, 1);
    });
  }
});

test("LazyConnection.connect() makes a Disposable an AsyncDisposable", async () => {
  let disposals = 0;
  const disposable = {
    async [Symbol.dispose]() { // a promise is waited for, though no one has to
      await settled(5);
      disposals++;
    },
  };
  const lazy = new LazyConnection(() => disposable);
  {
    await using conn = await lazy.connect();
    assertStrictEquals(conn, disposable);
  }
  const conn = await lazy.connect();
  await conn[Symbol.asyncDispose]();
  assertEquals(disposals, 2);
  await conn[Symbol.asyncDispose](); // it stays one, for whoever has it next
  assertEquals(disposals, 3);
  await assertFree(lazy);
});

test("LazyConnection.connect() waits for whatever closing returns", async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  const thenable: PromiseLike<void> = {
    then: (...args) => promise.then(...args),
  };
  const lazy = new LazyConnection(() => ({
    [Symbol.asyncDispose]: () => thenable,
  }));
  const closing = (await lazy.connect())[Symbol.asyncDispose]();
  await settled();
  await assertRejects(() => lazy.connect(), AlreadyExists);
  resolve();
  await closing;
  await using _next = await lazy.connect();
});

test("LazyConnection.connect() frees the task if closing fails", async (t) => {
  const error = new Error("close");
  const fail = () => {
    throw error;
  };
  const failing: Record<string, Disposable & AsyncDisposable> = {
    "by throwing": { [Symbol.dispose]: fail, [Symbol.asyncDispose]: fail },
    "by rejecting": {
      [Symbol.dispose]: fail,
      [Symbol.asyncDispose]: () => Promise.reject(error),
    },
  };
  for (const [name, object] of Object.entries(failing)) {
    await t.step(name, async () => {
      const lazy = new LazyConnection(() => object);
      const conn = await lazy.connect();
      assertStrictEquals(assertThrows(() => conn[Symbol.dispose]()), error);
      const next = await lazy.connect();
      const closing = assertRejects(async () => {
        await next[Symbol.asyncDispose]();
      });
      assertStrictEquals(await closing, error);
      await lazy.connect();
    });
  }
});

test("LazyConnection.connect() gives the object its own methods back when closing starts", async (t) => {
  class Both {
    seen: unknown[] = [];
    look() {
      this.seen.push(this[Symbol.dispose], this[Symbol.asyncDispose]);
    }
    [Symbol.dispose]() {
      this.look();
    }
    [Symbol.asyncDispose]() {
      this.look();
      return Promise.resolve();
    }
  }
  const inherited = () => new Both();
  const own = () =>
    Object.assign(new Both(), {
      [Symbol.dispose]: Both.prototype[Symbol.dispose],
      [Symbol.asyncDispose]: Both.prototype[Symbol.asyncDispose],
    });
  for (const [name, make] of Object.entries({ inherited, own })) {
    for (const key of [Symbol.dispose, Symbol.asyncDispose] as const) {
      await t.step(`${name}, ${String(key)}`, async () => {
        const object = make();
        const keys = Reflect.ownKeys(object);
        const { [Symbol.dispose]: dispose, [Symbol.asyncDispose]: async } =
          object;
        const lazy = new LazyConnection(() => object);
        for (let i = 0; i < 2; i++) {
          const conn = await lazy.connect();
          assertNotEquals<unknown>(conn[Symbol.dispose], dispose);
          assertNotEquals<unknown>(conn[Symbol.asyncDispose], async);
          object.seen = [];
          await conn[key]();
          assertEquals(object.seen.length, 2);
          assertStrictEquals(object.seen[0], dispose);
          assertStrictEquals(object.seen[1], async);
          assertEquals(Reflect.ownKeys(object), keys);
        }
      });
    }
  }
  await t.step("all but the method that it lacked", async () => {
    const object = { [Symbol.dispose]() {} };
    const { [Symbol.dispose]: dispose } = object;
    const lazy = new LazyConnection(() => object);
    const leftover = new Set<unknown>();
    for (let i = 0; i < 2; i++) {
      const conn = await lazy.connect();
      conn[Symbol.dispose]();
      leftover.add(conn[Symbol.asyncDispose]);
      assertStrictEquals(object[Symbol.dispose], dispose);
      const keys = [Symbol.dispose, Symbol.asyncDispose];
      assertEquals(Reflect.ownKeys(object), keys);
    }
    assertEquals(leftover.size, 1);
  });
});

test("LazyConnection.connect() closes an object that does not take its methods back", async (t) => {
  const fail = () => {
    throw new Error("no");
  };
  const changes: Record<string, (fake: Fake) => void> = {
    "frozen": (fake) => Object.freeze(fake),
    "with a setter that throws": (fake) =>
      Object.defineProperty(fake, Symbol.dispose, { set: fail }),
  };
  for (const [name, change] of Object.entries(changes)) {
    await t.step(name, async () => {
      const fake = new Fake();
      const lazy = new LazyConnection(() => fake);
      await lazy.run(async () => change(await lazy.connect()));
      assertEquals(fake.calls, ["asyncDispose"]);
      await lazy[Symbol.asyncDispose]();
    });
  }
});

test("LazyConnection.connect() gives methods back through an inherited setter", async () => {
  class Accessor {
    closings = 0;
    #dispose = () => void this.closings++;
    get [Symbol.dispose]() {
      return this.#dispose;
    }
    set [Symbol.dispose](dispose) {
      this.#dispose = dispose;
    }
  }
  const object = new Accessor();
  const lazy = new LazyConnection(() => object);
  for (let i = 0; i < 3; i++) await lazy.run(() => lazy.connect());
  assertEquals(object.closings, 3);
});

test("LazyConnection.connect() lets an object wait for code that disposes of it", async () => {
  class Reader {
    stop = Promise.withResolvers<void>();
    reading = Promise.resolve();
    async read() {
      await using _reader = this;
      await this.stop.promise;
    }
    async [Symbol.asyncDispose]() {
      this.stop.resolve();
      await this.reading;
    }
  }
  const lazy = new LazyConnection(() => new Reader());
  await lazy.run(async () => {
    const conn = await lazy.connect();
    conn.reading = conn.read();
  });
});

test("LazyConnection.connect() lets an object close itself by its own methods", async () => {
  const calls: string[] = [];
  class Client {
    closed = false;
    async close() {
      calls.push("close");
      await this[Symbol.asyncDispose]();
    }
    [Symbol.dispose]() {
      calls.push("dispose");
    }
    async [Symbol.asyncDispose]() {
      calls.push("asyncDispose");
      if (this.closed) return;
      this.closed = true;
      this[Symbol.dispose]();
      await this.close();
    }
  }
  const lazy = new LazyConnection(() => new Client());
  await lazy.run(() => lazy.connect());
  assertEquals(calls, ["asyncDispose", "dispose", "close", "asyncDispose"]);
});

test("LazyConnection.connect() closes once, and a later disposal does nothing", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => slow);
  const conn = await lazy.connect();
  const dispose = conn[Symbol.asyncDispose];
  const first = dispose();
  assert(!await isPending(dispose())); // it does not wait for the first one
  assert(await isPending(first));
  await assertRejects(() => lazy.connect(), AlreadyExists);
  slow.closing.resolve();
  await first;
  await dispose();
  assertEquals(slow.closings, 1);
});

test("LazyConnection.connect() is safe from the late disposal of an earlier one", async () => {
  const lazy = new LazyConnection(() => new Fake());
  const early = await lazy.connect();
  const { [Symbol.dispose]: dispose, [Symbol.asyncDispose]: asyncDispose } =
    early;
  dispose();
  const conn = await lazy.connect();
  dispose();
  await asyncDispose();
  assertStrictEquals(lazy.current, conn);
  assertEquals(conn.calls, []);
  assertEquals(early.calls, ["dispose"]);
});

test("LazyConnection.connect() is safe from late disposal if an object is given again", async () => {
  const pooled = new Fake();
  const lazy = new LazyConnection(() => pooled);
  const { promise, resolve } = Promise.withResolvers<void>();
  const early = lazy.run(async () => {
    await using conn = await lazy.connect();
    using _conn = conn;
    conn[Symbol.dispose]();
    await promise;
  });
  await settled();
  await lazy.run(async () => {
    const conn = await lazy.connect();
    resolve();
    await early;
    assertStrictEquals(lazy.current, conn);
    assertEquals(pooled.calls, ["dispose"]);
  });
  assertEquals(pooled.calls, ["dispose", "asyncDispose"]);
});

test("LazyConnection.connect() takes what a pool gives on from within its disposal", async (t) => {
  /** A pool of one, which gives its object to the next who waits. */
  class Pool<C> {
    waiting: PromiseWithResolvers<C>[] = [];
    free: C[];
    constructor(object: C) {
      this.free = [object];
    }
    acquire() {
      if (this.free.length > 0) return this.free.pop()!;
      this.waiting.push(Promise.withResolvers());
      return this.waiting.at(-1)!.promise;
    }
    release(object: C) {
      const next = this.waiting.shift();
      if (next) next.resolve(object);
      else this.free.push(object);
    }
  }
  const objects: Record<string, Disposable | AsyncDisposable> = {
    "at once": {
      [Symbol.dispose]() {
        pool.release(this);
      },
    },
    "asynchronously": {
      async [Symbol.asyncDispose]() {
        await settled(1);
        const release = async () => await pool.release(this);
        await release();
      },
    },
  };
  let pool = new Pool<Disposable | AsyncDisposable>(new Fake());
  for (const [name, object] of Object.entries(objects)) {
    await t.step(name, async () => {
      pool = new Pool(object);
      const lazy = new LazyConnection(() => pool.acquire());
      const task = async () => {
        await using _conn = await lazy.connect();
      };
      const tasks = [task, () => lazy.get(), task, () => lazy.get()];
      await Promise.all(tasks.map((task) => lazy.run<[], unknown>(task)));
      assertEquals(pool.free, [object]);
    });
  }
});

test("LazyConnection.connect() takes an object given again any number of times", async () => {
  const pooled = new Fake();
  const lazy = new LazyConnection(() => pooled);
  for (let i = 0; i < 20_000; i++) (await lazy.connect())[Symbol.dispose]();
  assertEquals(pooled.calls.length, 20_000);
});

// The opener

test("LazyConnection.connect() passes the error of the opener through", async () => {
  const error = new Error("opener");
  const fake = new Fake();
  const openers: Opener<Fake>[] = [
    () => {
      throw error;
    },
    () => Promise.reject(error),
    () => fake,
  ];
  const lazy = new LazyConnection((signal) => openers.shift()!(signal));
  assertStrictEquals(await assertRejects(() => lazy.connect()), error);
  assertStrictEquals(await assertRejects(() => lazy.connect()), error);
  assertStrictEquals(await lazy.connect(), fake);
  await lazy[Symbol.asyncDispose]();
  assertEquals(fake.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() rejects what it cannot dispose of or replace", async (t) => {
  const error = new Error("getter");
  const calls: string[] = [];
  const dispose = () => void calls.push("dispose");
  const asyncDispose = () => Promise.resolve(void calls.push("asyncDispose"));
  /** Each with how it is closed. */
  const given: Record<string, [given: unknown, closed?: string]> = {
    "undefined": [undefined],
    "null": [null],
    "a primitive": [1],
    "an object without disposal": [{ close() {} }],
    "a method that is none": [{ [Symbol.asyncDispose]: true }],
    "one method that is none": [
      { [Symbol.asyncDispose]: true, [Symbol.dispose]: dispose },
      "dispose",
    ],
    "a frozen object": [
      Object.freeze({
        [Symbol.dispose]: dispose,
        [Symbol.asyncDispose]: asyncDispose,
      }),
      "asyncDispose",
    ],
    "an object that takes no method": [
      Object.preventExtensions({ [Symbol.dispose]: dispose }),
      "dispose",
    ],
    "a read-only Symbol.dispose": [
      Object.defineProperty(
        { [Symbol.asyncDispose]: asyncDispose },
        Symbol.dispose,
        { value: dispose },
      ),
      "asyncDispose",
    ],
    "a read-only Symbol.dispose alone": [
      Object.defineProperty({}, Symbol.dispose, { value: dispose }),
      "dispose",
    ],
    "a read-only Symbol.asyncDispose": [
      Object.defineProperty(
        { [Symbol.dispose]: dispose },
        Symbol.asyncDispose,
        { value: asyncDispose },
      ),
      "asyncDispose",
    ],
    "a setter without effect": [
      {
        [Symbol.dispose]: dispose,
        get [Symbol.asyncDispose]() {
          return asyncDispose;
        },
        set [Symbol.asyncDispose](_) {
          // ignores it
        },
      },
      "asyncDispose",
    ],
    "a getter of Symbol.dispose that throws": [
      {
        get [Symbol.dispose]() {
          throw error;
        },
        [Symbol.asyncDispose]: asyncDispose,
      },
      "asyncDispose",
    ],
    "a getter of Symbol.asyncDispose that throws": [
      {
        [Symbol.dispose]: dispose,
        get [Symbol.asyncDispose]() {
          throw error;
        },
      },
      "dispose",
    ],
  };
  for (const [name, [object, closed]] of Object.entries(given)) {
    await t.step(name, async () => {
      const before = Object.getOwnPropertyDescriptors(Object(object));
      const next = new Fake();
      const objects = [object, object, next].values();
      // That is what the types forbid
      const lazy = new LazyConnection(() => objects.next().value as Fake);
      for (let i = 0; i < 2; i++) {
        calls.length = 0;
        const refused = await assertRejects(
          () => lazy.connect(),
          TypeError,
          NOT_DISPOSABLE,
        );
        assertInstanceOf(refused.cause, Error);
        assertEquals(calls, closed ? [closed] : []);
        const after = Object.getOwnPropertyDescriptors(Object(object));
        assertEquals(after, before);
      }
      assertStrictEquals(await lazy.connect(), next);
      await lazy[Symbol.asyncDispose]();
      assertEquals(next.calls, ["asyncDispose"]);
    });
  }
});

test("LazyConnection.connect() says why it rejects what the opener returned", async () => {
  const error = new Error("getter");
  const given: [unknown, unknown][] = [
    [{}, "It has neither method"],
    [
      { [Symbol.dispose]: 1 },
      "Its Symbol(Symbol.dispose) is not a function",
    ],
    [
      {
        get [Symbol.dispose]() {
          throw error;
        },
      },
      error,
    ],
    [
      {
        get [Symbol.dispose]() {
          return () => {};
        },
        set [Symbol.dispose](_) {
          // ignores it
        },
      },
      "Its setter has no effect",
    ],
  ];
  for (const [object, cause] of given) {
    const lazy = new LazyConnection(() => object as Fake);
    const refused = await assertRejects(() => lazy.connect(), TypeError);
    if (cause === error) assertStrictEquals(refused.cause, error);
    else {
      assertInstanceOf(refused.cause, TypeError);
      assertEquals(refused.cause.message, cause);
    }
  }
});

test("LazyConnection.connect() takes a function for a connection, and null for no method", async () => {
  const calls: string[] = [];
  const dispose = () => void calls.push("dispose");
  const fn = Object.assign(() => {}, { [Symbol.dispose]: dispose });
  const nothing = { [Symbol.asyncDispose]: null, [Symbol.dispose]: dispose };
  for (const object of [fn, nothing]) {
    const lazy = new LazyConnection<Disposable>(() => object);
    await lazy.run(() => lazy.connect());
  }
  assertEquals(calls, ["dispose", "dispose"]);
});

test("LazyConnection.connect() rejects another task's connection", async () => {
  const shared = new Slow();
  const pool = () => shared;
  const [a, b] = [new LazyConnection(pool), new LazyConnection(pool)];
  const refused = async () => {
    for (const lazy of [a, b, b]) {
      await assertRejects(() => lazy.run(() => lazy.get()), Busy, HELD);
    }
    assertEquals(shared.closings, closings);
  };
  let closings = 0;
  const conn = await a.connect();
  await refused(); // open
  assertStrictEquals(a.current, conn);

  const closing = conn[Symbol.asyncDispose]();
  closings = 1;
  await refused(); // closing
  shared.closing.resolve();
  await closing;
  for (const lazy of [b, a]) await lazy.run(() => lazy.connect());
  assertEquals(shared.closings, 3);
});

test("LazyConnection.connect() rejects if its opener disposes of everything", async () => {
  const fake = new Fake();
  let disposal: Promise<void> | undefined;
  const lazy: LazyConnection<Fake> = new LazyConnection(() => {
    disposal = lazy[Symbol.asyncDispose]();
    return fake;
  });
  await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  await disposal;
  assertEquals(fake.calls, ["asyncDispose"]);
});

// Cancelling

test("LazyConnection.connect() does not start with an aborted signal", async () => {
  const reason = { own: "reason" };
  const signal = AbortSignal.abort(reason);
  const control = new Control();
  const { lazy } = control;
  const refused = await assertRejects(() => lazy.connect({ signal }));
  assertStrictEquals(refused, reason);
  assertEquals(control.calls, 0);
  const connect = lazy.connect({ signal: undefined });
  const fake = new Fake();
  control.answer.resolve(fake);
  assertStrictEquals(await connect, fake);
  await lazy[Symbol.asyncDispose]();
  assertEquals(fake.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() is free again after a signal that is none", async () => {
  const fake = new Fake();
  const lazy = new LazyConnection(() => fake);
  const signal = { aborted: false } as AbortSignal; // a polyfill's, say
  await assertRejects(() => lazy.connect({ signal }), TypeError);
  assertStrictEquals(await lazy.connect(), fake);
  await lazy[Symbol.asyncDispose]();
});

test("LazyConnection.connect() rejects with the reason of its signal", async () => {
  for (const reason of [new Error("enough"), "enough", null, 0]) {
    const lazy = new LazyConnection<Fake>(never);
    const controller = new AbortController();
    const connect = lazy.connect(controller);
    controller.abort(reason);
    assertStrictEquals(await assertRejects(() => connect), reason);
  }
  const control = new Control();
  const { lazy } = control;
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort(null);
  control.answer.reject(new Error("an error of the opener's own"));
  assertStrictEquals(await assertRejects(() => connect), null);
});

test("LazyConnection.connect() rejects in time with AbortSignal.timeout()", async () => {
  const lazy = new LazyConnection<Fake>(never);
  const signal = AbortSignal.timeout(5);
  const error = await assertRejects(
    () => lazy.connect({ signal }),
    DOMException,
  );
  assertEquals(error.name, "TimeoutError");
});

test("LazyConnection.connect() heeds its signal and that of the options", async () => {
  let connected: AbortSignal | undefined;
  using _stub = stubConnect(({ signal }) => never(connected = signal!));
  for (const which of [0, 1]) {
    const controllers = [new AbortController(), new AbortController()];
    const [own, options] = controllers;
    const lazy = new LazyConnection({ port: 1, signal: options!.signal });
    const connect = lazy.connect(own);
    controllers[which]!.abort("enough");
    assertEquals(await assertRejects(() => connect), "enough");
    assertEquals(connected?.reason, "enough");
  }
  const controller = new AbortController();
  const lazy = new LazyConnection({ port: 1, signal: controller.signal });
  const connect = lazy.get();
  controller.abort("enough");
  assertEquals(await assertRejects(() => connect), "enough");
  connected = undefined;
  assertEquals(await assertRejects(() => lazy.connect()), "enough");
  assertEquals(connected, undefined);
});

test("LazyConnection.connect() waits for an opener that ignores its signal", async () => {
  const control = new Control();
  const { lazy } = control;
  const controller = new AbortController();
  const connect = assertRejects(() => lazy.connect(controller));
  controller.abort("enough");
  assert(await isPending(connect));
  await assertRejects(() => lazy.connect(), AlreadyExists);

  const late = new Fake();
  control.answer.resolve(late);
  assertEquals(await connect, "enough");
  assertEquals(late.calls, ["asyncDispose"]);
  assertEquals(Reflect.ownKeys(late), ["calls"]);
  lazy.connect();
  assertEquals(control.calls, 2);
});

test("LazyConnection.connect() closes what comes late, if it is no other task's", async () => {
  const control = new Control();
  const { lazy } = control;
  const pooled = new Fake();
  const late = async () => {
    const controller = new AbortController();
    const connect = lazy.run(() => lazy.connect(controller));
    controller.abort("enough");
    control.answer.resolve(pooled);
    assertEquals(await assertRejects(() => connect), "enough");
  };
  const first = lazy.connect();
  control.answer.resolve(pooled);
  await first;
  await late(); // still the main task's
  assertEquals(pooled.calls, []);
  (await first)[Symbol.dispose]();
  await late();
  assertEquals(pooled.calls, ["dispose", "asyncDispose"]);
});

test("LazyConnection.connect() rejects in the disposal of what comes late", async () => {
  const control = new Control<AsyncDisposable>();
  const { lazy } = control;
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort("enough");
  let refused = 0;
  control.answer.resolve({
    async [Symbol.asyncDispose]() {
      await assertRejects(() => lazy.get(), AlreadyExists);
      refused++;
    },
  });
  assertEquals(await assertRejects(() => connect), "enough");
  assertEquals(refused, 1);
});

test("LazyConnection.connect() keeps the reason if closing fails too", async () => {
  const control = new Control<Stuck>();
  const { lazy } = control;
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort("enough");
  const late = new Stuck();
  control.answer.resolve(late);
  const both = await assertRejects(() => connect, SuppressedError);
  assertStrictEquals(both.suppressed, "enough");
  assertStrictEquals(both.error, late.error);
  lazy.connect();
  assertEquals(control.calls, 2);
});

test("LazyConnection.connect() never aborts the opener's signal after it has opened", async () => {
  const own = new AbortController();
  const options = new AbortController();
  const signals: AbortSignal[] = [];
  const fake = new Fake();
  using _stub = stubConnect(({ signal }) => {
    signals.push(signal!);
    // A Fake will do for a TcpConn
    return Promise.resolve(fake as unknown as Deno.TcpConn);
  });
  const lazy = new LazyConnection({ port: 1, signal: options.signal });
  await lazy.run(async () => {
    const conn = await lazy.connect(own);
    own.abort();
    options.abort();
    assertStrictEquals(lazy.current, conn);
  });
  await lazy[Symbol.asyncDispose]();
  assertEquals(signals.map(({ aborted }) => aborted), [false]);
  assertEquals(fake.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() never aborts the opener's signal while closing", async () => {
  const control = new Control<Slow>();
  const { lazy } = control;
  const slow = new Slow();
  const run = lazy.run(async () => {
    const connect = lazy.connect();
    control.answer.resolve(slow);
    (await connect)[Symbol.asyncDispose]();
  });
  assert(await isPending(run));
  const disposal = lazy[Symbol.asyncDispose]();
  slow.closing.resolve();
  await Promise.all([run, disposal]);
  assertEquals(control.signal.aborted, false);
});

test("LazyConnection.connect() adds no listener to a signal that attempts share", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  let listeners = 0;
  signal.addEventListener = () => listeners++;
  const lazy = new LazyConnection<Fake>(never);
  const attempts = Array.from(
    { length: 100 },
    () => assertRejects(() => lazy.run(() => lazy.connect({ signal }))),
  );
  controller.abort("enough");
  assertEquals(await Promise.all(attempts), Array(100).fill("enough"));
  assertEquals(listeners, 0);
});

// Sockets

netTest(
  "LazyConnection.connect() gives each task a TcpConn of its own",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ ...loopback, port: listener.addr.port });
    const port = async () => {
      await using conn = await lazy.connect();
      assertStrictEquals(lazy.current, conn);
      assertEquals(conn.remoteAddr.port, listener.addr.port);
      using server = await listener.accept();
      await conn.write(new Uint8Array(3));
      assertEquals(await server.read(new Uint8Array(9)), 3);
      return conn.localAddr.port;
    };
    const [a, b] = await Promise.all([lazy.run(port), lazy.run(port)]);
    assertNotEquals(a, b);
  },
);

netTest("LazyConnection.connect() closes a TcpConn in each way", async () => {
  using listener = Deno.listen(loopback);
  const lazy = new LazyConnection({ port: listener.addr.port });
  for (const key of [Symbol.dispose, Symbol.asyncDispose] as const) {
    const conn = await lazy.connect();
    using server = await listener.accept();
    await conn[key]();
    assertEquals(await server.read(new Uint8Array(1)), null);
    await assertRejects(() => conn.write(new Uint8Array(1)), BadResource);
    await assertFree(lazy);
    (await listener.accept()).close();
  }
});

netTest(
  "LazyConnection.connect() frees a task whose TcpConn was closed by hand",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ port: listener.addr.port });
    {
      await using conn = await lazy.connect();
      conn.close();
      await assertRejects(() => lazy.connect(), AlreadyExists);
    }
    await assertFree(lazy);
  },
);

netTest(
  "LazyConnection.connect() is cancelled at once over a socket",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ port: listener.addr.port });
    const controller = new AbortController();
    const connect = lazy.connect(controller);
    controller.abort("enough");
    assertEquals(await assertRejects(() => connect), "enough");
    await assertFree(lazy);
  },
);

netTest(
  "LazyConnection.connect() closes a socket that opened as its signal aborted",
  async () => {
    using listener = Deno.listen(loopback);
    const controller = new AbortController();
    const connect = Deno.connect;
    let conn: Deno.TcpConn | undefined;
    // As Deno.connect() does, where the abort comes between its last two steps
    using _stub = stubConnect(async ({ signal, ...options }) => {
      try {
        return conn = await connect(options);
      } finally {
        controller.abort("enough");
        signal!.throwIfAborted();
      }
    });
    const lazy = new LazyConnection({ port: listener.addr.port });
    const attempt = assertRejects(() => lazy.connect(controller));
    assertEquals(await attempt, "enough");
    await assertRejects(() => conn!.write(new Uint8Array(1)), BadResource);
  },
);

netTest(
  "LazyConnection holds a thousand tasks' connections at once",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ port: listener.addr.port });
    const all = Promise.withResolvers<void>();
    let open = 0;
    const echo = async (id: number) => {
      await using conn = await lazy.connect();
      open++;
      await all.promise;
      await (await lazy.get()).write(new TextEncoder().encode(`task ${id}`));
      await conn.closeWrite();
      return await new Response(conn.readable).text();
    };
    const ids = Array.from({ length: 1_000 }, (_, id) => id);
    const echoes: Promise<string>[] = [];
    const served: Promise<void>[] = [];
    for (const id of ids) { // one after the other, as a backlog can be short
      echoes.push(lazy.run(echo, id));
      const conn = await listener.accept();
      served.push(conn.readable.pipeTo(conn.writable));
    }
    while (open < ids.length) await delay(1);
    all.resolve();
    assertEquals(await Promise.all(echoes), ids.map((id) => `task ${id}`));
    await Promise.all(served);
  },
);

// The end of the LazyConnection

test("LazyConnection[Symbol.asyncDispose]() closes and cancels everything", async () => {
  const control = new Control<Slow>();
  const { lazy } = control;
  const open = [new Slow(), new Slow()];
  const main = lazy.connect();
  control.answer.resolve(open[0]!);
  await main;
  const end = Promise.withResolvers<void>();
  const task = lazy.run(async () => {
    const connect = lazy.connect();
    control.answer.resolve(open[1]!);
    await connect;
    await end.promise;
  });
  const opening = assertRejects(() => lazy.run(() => lazy.connect()));
  await settled();

  const disposal = lazy[Symbol.asyncDispose]();
  assertEquals(open.map((slow) => slow.closings), [1, 1]);
  const { reason } = control.signal;
  assertInstanceOf(reason, BadResource);
  assertEquals(reason.message, DISPOSED);
  assertEquals(lazy.current, undefined);
  await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  await assertRejects(() => lazy.get(), BadResource, DISPOSED);
  let started = false;
  const run = () => lazy.run(() => started = true);
  const message = "Cannot run a task: the LazyConnection has been disposed of";
  await assertRejects(run, BadResource, message);
  assertEquals(started, false);

  const again = lazy[Symbol.asyncDispose]();
  for (const slow of open) slow.closing.resolve();
  assert(await isPending(disposal));
  assert(await isPending(again));
  const late = new Slow();
  control.answer.resolve(late);
  late.closing.resolve();
  await Promise.all([disposal, again]);
  assertStrictEquals(await opening, reason);
  assertEquals([...open, late].map((slow) => slow.closings), [1, 1, 1]);
  end.resolve();
  await task;
  await lazy[Symbol.asyncDispose]();
});

test("LazyConnection[Symbol.asyncDispose]() closes each connection inside its task", async () => {
  const seen: unknown[] = [];
  const lazy: LazyConnection<Disposable> = new LazyConnection(() => ({
    [Symbol.dispose]: () => seen.push(lazy.current),
  }));
  await lazy.connect(); // the first to be closed, while the task's is open
  await lazy.run(async () => {
    await lazy.connect();
    await lazy[Symbol.asyncDispose]();
  });
  assertEquals(seen, [undefined, undefined]);
});

test("LazyConnection[Symbol.asyncDispose]() has nothing to do with tasks that are free", async () => {
  const lazy = new LazyConnection(() => new Fake());
  for (let i = 0; i < 1_000; i++) await lazy.run(() => lazy.connect());
  // It would take longer to wait for a thousand, one by one
  assert(!await isPending(lazy[Symbol.asyncDispose]()));
});

test("LazyConnection[Symbol.asyncDispose]() reports every error of closing", async () => {
  const stuck = Array.from({ length: 3 }, () => new Stuck());
  const slow = new Slow();
  const opener = [...stuck, slow].values();
  const lazy = new LazyConnection(() => opener.next().value!);
  const end = Promise.withResolvers<void>();
  const task = async () => {
    await lazy.connect();
    await end.promise;
  };
  const tasks = [...stuck, slow].map(() => lazy.run(task));
  await settled();
  const all = lazy[Symbol.asyncDispose]();
  await delay(1); // no error goes unhandled for as long as another one closes
  slow.closing.resolve();
  const outer = await assertRejects(() => all, SuppressedError);
  const inner = outer.suppressed as SuppressedError;
  const reported = [outer.error, inner.error, inner.suppressed];
  assertEquals(new Set(reported), new Set(stuck.map((stuck) => stuck.error)));
  end.resolve();
  await Promise.all(tasks);

  const one = new LazyConnection(() => stuck[0]!);
  await one.connect();
  const disposal = assertRejects(() => one[Symbol.asyncDispose]());
  assertStrictEquals(await disposal, stuck[0]!.error);
});

// Timing

test("LazyConnection keeps its promises whenever an attempt ends", async (t) => {
  const ends: Record<string, (run: Run) => unknown> = {
    "by its task": ({ end }) => end.resolve(),
    "by its signal": ({ controller }) => controller.abort("enough"),
    "by the disposal of everything": ({ lazy }) => lazy[Symbol.asyncDispose](),
  };
  type Run = {
    lazy: LazyConnection<Fake>;
    end: PromiseWithResolvers<void>;
    controller: AbortController;
  };
  for (const [name, finish] of Object.entries(ends)) {
    await t.step(name, async () => {
      for (let ticks = 0; ticks < 30; ticks++) {
        const conns: Fake[] = [];
        const signals: AbortSignal[] = [];
        const lazy = new LazyConnection(async (signal) => {
          signals.push(signal);
          await settled(5);
          conns.push(new Fake());
          return conns.at(-1)!;
        });
        const end = Promise.withResolvers<void>();
        const controller = new AbortController();
        const outcomes: PromiseSettledResult<Fake>[] = [];
        const run = lazy.run(async () => {
          const attempts = [lazy.connect(controller), lazy.get()];
          const all = Promise.allSettled(attempts);
          all.then((settled) => outcomes.push(...settled));
          await end.promise;
        });
        await settled(ticks);
        finish({ lazy, end, controller });
        await settled();
        end.resolve();
        await run;
        await lazy[Symbol.asyncDispose]();
        const at = `after ${ticks} microtasks`;
        assertEquals(conns.map(({ calls }) => calls), [["asyncDispose"]], at);
        const [connect, get] = outcomes;
        assertEquals(get, connect, at);
        assertEquals(signals[0]!.aborted, connect!.status === "rejected", at);
      }
    });
  }
});

// Random schedules

/** Numbers from 0 up to but not including `n`, the same ones for the same seed. */
function random(seed: number): (n: number) => number {
  return (n) => { // mulberry32
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % n;
  };
}

/** A connection that knows whether it is open; it may be slow to close. */
class Client implements Disposable, AsyncDisposable {
  state: "open" | "closing" | "closed" = "closed";
  closing = Promise.withResolvers<void>();
  open() {
    assertEquals(this.state, "closed");
    this.state = "open";
    this.closing = Promise.withResolvers();
  }
  [Symbol.dispose]() {
    assertEquals(this.state, "open");
    this.state = "closed";
  }
  async [Symbol.asyncDispose]() {
    assertEquals(this.state, "open");
    this.state = "closing";
    await this.closing.promise;
    this.state = "closed";
  }
}

/** What a schedule knows of a task, without asking the LazyConnection. */
class Actor {
  state: "free" | "opening" | "open" | "closing" = "free";
  ended = false;
  /** Calls a function inside the task. */
  enter = <T>(fn: () => T): T => fn();
  readonly end = Promise.withResolvers<void>();
  run: Promise<void> = this.end.promise;
  /** The last attempt: what aborts its signal, if it has one. */
  controller: AbortController | undefined;
  /** What answers for its opener, until it has. */
  answer: PromiseWithResolvers<Client> | undefined;
  client: Client | undefined;
  /** Why it failed or is going to. */
  reason: unknown;
  /** Why it may have been cancelled: the answer came only just before. */
  race: unknown;
  racing = false;
  /** What those who wait for it got, `undefined` until then. */
  outcomes: { value: unknown }[] = [];
}

/** Drives random steps, and checks after them that what must hold does hold. */
class Schedule {
  readonly log: string[] = [];
  readonly #pick: (n: number) => number;
  readonly #clients: Client[] = [];
  readonly #late: (() => unknown)[] = [];
  readonly #refusals: Promise<unknown>[] = [];
  readonly #main = new Actor();
  readonly #lazy: LazyConnection<Client>;
  readonly #actors: Actor[];
  #calling: Actor | undefined;
  #disposal: Promise<void> | undefined;

  constructor(seed: number) {
    this.#pick = random(seed);
    this.#lazy = new LazyConnection((signal) => this.#open(signal));
    this.#actors = [this.#main, this.#start(), this.#start(), this.#start()];
  }

  async run(): Promise<void> {
    const names = Object.keys(this.#steps);
    for (let i = 0; i < 60; i++) {
      this.#step(names[this.#pick(names.length)]!);
      if (this.#pick(2) === 0) {
        const ticks = this.#pick(30);
        this.log.push(`${ticks} ticks`);
        await settled(ticks);
        this.#step(["abort", "end", "dispose"][this.#pick(3)]!);
      }
      await settled();
      await this.#check();
    }
    // Whatever is left over comes to its end
    this.#disposal ??= this.#lazy[Symbol.asyncDispose]();
    for (const { answer } of this.#actors) answer?.reject(new Error("over"));
    for (const { closing } of this.#clients) closing.resolve();
    for (const { end } of this.#actors) end.resolve();
    await Promise.all([this.#disposal, ...this.#actors.map(({ run }) => run)]);
    for (const { state } of this.#clients) assertEquals(state, "closed");
  }

  #step(name: string) {
    const i = this.#pick(this.#actors.length);
    this.log.push(`${name} ${i}`);
    this.#steps[name]!(this.#actors[i]!);
  }

  #start(): Actor {
    const actor = new Actor();
    actor.run = this.#lazy.run(() => {
      actor.enter = AsyncLocalStorage.snapshot();
      return actor.end.promise;
    });
    return actor;
  }

  #open(signal: AbortSignal): Promise<Client> {
    const actor = this.#calling!;
    assertEquals(actor.state, "free"); // never a second one
    const answer = Promise.withResolvers<Client>();
    actor.state = "opening";
    actor.answer = answer;
    actor.controller = actor.client = actor.reason = undefined;
    actor.outcomes = [];
    if (this.#pick(2) === 0) { // half of them heed their signal
      signal.addEventListener("abort", () => {
        if (actor.answer !== answer) return;
        this.#reject(actor, signal.reason);
      });
    }
    return answer.promise;
  }

  #ask(actor: Actor, ask: () => Promise<Client>, joins: boolean) {
    const { state, answer } = actor;
    const refused = this.#disposal || actor.ended
      ? BadResource
      : state === "free" || joins && state !== "closing"
      ? undefined
      : AlreadyExists;
    this.#calling = actor;
    const asked = actor.enter(ask);
    this.#calling = undefined;
    if (refused) {
      assertStrictEquals(actor.answer, answer);
      this.#refusals.push(assertRejects(() => asked, refused));
      return;
    }
    const outcome: { value: unknown } = { value: undefined };
    actor.outcomes.push(outcome);
    const settle = (value: unknown) => outcome.value = value;
    asked.then(settle, settle);
  }

  #reject(actor: Actor, reason: unknown) {
    actor.reason ??= reason;
    actor.state = "free";
    actor.racing = true;
    actor.answer!.reject(reason);
    actor.answer = undefined;
  }

  #cancel(actor: Actor, reason: unknown) {
    if (actor.state === "opening") actor.reason ??= reason;
    else if (actor.racing) actor.race = reason;
  }

  #finish(actor: Actor) {
    this.#cancel(actor, BadResource);
    if (actor.state === "open") actor.state = "closing";
  }

  readonly #steps: Record<string, (actor: Actor) => void> = {
    connect: (actor) => {
      const { state } = actor;
      const controller = new AbortController();
      this.#ask(actor, () => this.#lazy.connect(controller), false);
      if (actor.state !== state) actor.controller = controller;
    },
    get: (actor) => this.#ask(actor, () => this.#lazy.get(), true),
    resolve: (actor) => {
      if (!actor.answer) return;
      const pooled = this.#clients.filter(({ state }) => state === "closed");
      let client = pooled[this.#pick(2 * pooled.length)];
      if (!client) this.#clients.push(client = new Client());
      client.open();
      actor.client = client;
      actor.racing = actor.reason === undefined;
      actor.state = actor.racing ? "open" : "closing";
      actor.answer.resolve(client);
      actor.answer = undefined;
    },
    reject: (actor) => {
      if (actor.answer) this.#reject(actor, new Error("opener"));
    },
    abort: (actor) => {
      if (!actor.controller || actor.controller.signal.aborted) return;
      const reason = new Error("abort");
      this.#cancel(actor, reason);
      actor.controller.abort(reason);
    },
    close: (actor) => {
      if (actor.state !== "open") return;
      const { [Symbol.dispose]: dispose, [Symbol.asyncDispose]: asyncDispose } =
        actor.client!;
      this.#late.push(dispose, asyncDispose);
      const now = this.#pick(2) === 0;
      actor.state = now ? "free" : "closing";
      if (now) dispose();
      else asyncDispose();
    },
    finishClosing: (actor) => {
      if (actor.state !== "closing") return;
      actor.client!.closing.resolve();
      actor.state = "free";
    },
    closeLate: () => {
      this.#late[this.#pick(this.#late.length)]?.();
    },
    end: (actor) => {
      if (actor === this.#main || actor.ended) return;
      actor.ended = true;
      this.#finish(actor);
      actor.end.resolve();
    },
    restart: (actor) => {
      const i = this.#actors.indexOf(actor);
      if (this.#disposal || !actor.ended || actor.state !== "free") return;
      this.#actors[i] = this.#start();
    },
    dispose: (actor) => {
      if (actor !== this.#main || this.#pick(4) > 0) return;
      for (const actor of this.#actors) this.#finish(actor);
      this.#disposal ??= this.#lazy[Symbol.asyncDispose]();
    },
  };

  /** Learns who has won, where cancelling raced with the opener's answer. */
  #settleRace(actor: Actor) {
    const { race, outcomes: [first] } = actor;
    actor.racing = false;
    actor.race = undefined;
    if (race === undefined) return;
    if (actor.reason !== undefined) { // it fails for one reason or the other
      if (!fits(first?.value, actor.reason)) actor.reason = race;
    } else if (first?.value === undefined) { // cancelled, and closing
      actor.reason = race;
      actor.state = "closing";
    }
  }

  async #check() {
    await Promise.all(this.#refusals.splice(0));
    for (const [i, actor] of this.#actors.entries()) {
      this.#settleRace(actor);
      const { state, client, reason, outcomes } = actor;
      const at = `task ${i}, ${state}`;
      const open = state === "open" ? client : undefined;
      assertStrictEquals(actor.enter(() => this.#lazy.current), open, at);
      if (client && state !== "free") assertEquals(client.state, state, at);
      const pending = state === "opening" ||
        state === "closing" && reason !== undefined;
      const expected = pending ? undefined : reason ?? client;
      for (const { value } of outcomes) assert(fits(value, expected), at);
      const over = actor.ended && state === "free";
      if (actor !== this.#main) {
        assertEquals(!await isPending(actor.run), over, at);
      }
    }
    const held = this.#actors.filter(({ state }) =>
      state === "open" || state === "closing"
    );
    const unclosed = this.#clients.filter(({ state }) => state !== "closed");
    assertEquals(new Set(unclosed), new Set(held.map(({ client }) => client!)));
    if (this.#disposal) {
      const free = this.#actors.every(({ state }) => state === "free");
      assertEquals(!await isPending(this.#disposal), free);
    }
  }
}

/** Whether an outcome is the expected one, of which `BadResource` is a class. */
function fits(value: unknown, expected: unknown): boolean {
  return value === expected ||
    expected === BadResource && value instanceof BadResource;
}

test("LazyConnection keeps its promises whatever the schedule", async () => {
  const seed = Deno.args[0];
  const first = seed === undefined ? Date.now() % 1e9 : Number(seed);
  const count = seed === undefined ? 200 : 1;
  for (let seed = first; seed < first + count; seed++) {
    const schedule = new Schedule(seed);
    try {
      await schedule.run();
    } catch (cause) {
      const steps = schedule.log.join(", ");
      const message = `Replay with deno task test -- ${seed}: ${steps}`;
      throw new Error(message, { cause });
    }
  }
});

// The demo

netTest(
  "demo shows two connections at once, a refusal and a cancellation",
  async () => {
    const lines: string[] = [];
    await main([], (line) => lines.push(line));
    const [a, b, both, ...rest] = lines;
    const from = /^task [12]: connected from (127\.0\.0\.1:\d+)$/;
    assertNotEquals(a!.match(from)![1], b!.match(from)![1]);
    assertEquals(both, "both connections are open");
    const got = rest.splice(0, 2).map((line) =>
      line.match(/^task ([12]): Got (\d+) bytes$/)!
    );
    assertEquals(new Set(got.map(([, task]) => task)), new Set(["1", "2"]));
    assertEquals(got[0]![2], got[1]![2]);
    assertEquals(rest, [
      "a second connect() in a task: AlreadyExists",
      "a connect() that its signal cancels: TimeoutError",
    ]);
  },
);

netTest("demo sends no request before both connections are open", async () => {
  const response = "HTTP/1.0 200 OK\r\n\r\nHello";
  const request = "GET /index.html HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n";
  using listener = Deno.listen(loopback);
  const connect = Deno.connect;
  const first = Promise.withResolvers<void>();
  let connects = 0;
  using _stub = stubConnect(async (options) => {
    if (++connects === 2) await first.promise;
    return await connect(options);
  });
  const lines: string[] = [];
  const port = String(listener.addr.port);
  const demo = main(["127.0.0.1", port], (line) => lines.push(line));
  const conns = [await listener.accept()];
  const read = async (conn: Deno.Conn) => {
    const buffer = new Uint8Array(1_000);
    const length = await conn.read(buffer) ?? 0;
    return new TextDecoder().decode(buffer.subarray(0, length));
  };
  const requests = [read(conns[0]!)];
  const early = Promise.race([requests[0], delay(20).then(() => "nothing")]);
  assertEquals(await early, "nothing");
  first.resolve();
  conns.push(await listener.accept());
  requests.push(read(conns[1]!));
  assertEquals(await Promise.all(requests), [request, request]);
  for (const conn of conns) {
    await conn.write(new TextEncoder().encode(response));
    conn.close();
  }
  await demo;
  const got = `: Got ${response.length} bytes`;
  const last = lines.slice(3).sort();
  assertEquals(last, [`task 1${got}`, `task 2${got}`]);
});

test("demo says in one line what is wrong", async () => {
  const usage = "Cannot run the demo: give HOST and PORT, or nothing";
  for (const args of [["127.0.0.1"], ["127.0.0.1", "80", "90"], ["", "80"]]) {
    const error = await assertRejects(() => main(args, () => {}), TypeError);
    assertEquals(error.message, usage);
  }
  let port: number | undefined;
  for (const reason of [new Error("no"), "no"]) {
    using _stub = stubConnect((options) => {
      port = options.port;
      return Promise.reject(reason);
    });
    const error = await assertRejects(
      () => main(["127.0.0.1", "80"], () => {}),
      Error,
    );
    assertEquals(error.message, "Cannot fetch from 127.0.0.1:80: no");
    assertStrictEquals(error.cause, reason);
  }
  assertEquals(port, 80);
});
