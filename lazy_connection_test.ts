// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertNotEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { delay } from "@std/async/delay";
import { main } from "./demo.ts";
import { LazyConnection, type Opener } from "./mod.ts";

const { AlreadyExists, BadResource, Busy } = Deno.errors;
const loopback = { hostname: "127.0.0.1", port: 0 };
const net = Deno.permissions.querySync({ name: "net", host: "127.0.0.1" });

function test(name: string, fn: () => void | Promise<void>, ignore = false) {
  Deno.test({ name, fn, ignore, sanitizeOps: true, sanitizeResources: true });
}

function netTest(name: string, fn: () => Promise<void>) {
  test(name, fn, net.state !== "granted");
}

/** A connection that can be closed in every way, and counts each of them. */
class Fake implements Disposable, AsyncDisposable {
  calls: unknown[] = [];
  close(...args: unknown[]) {
    this.calls.push("close", ...args);
    return args.length;
  }
  [Symbol.dispose]() {
    this.calls.push("dispose");
  }
  [Symbol.asyncDispose]() {
    this.calls.push("asyncDispose");
    return Promise.resolve();
  }
}

/** A connection that takes its time to close. */
class Slow implements AsyncDisposable {
  readonly closing = Promise.withResolvers<void>();
  closings = 0;
  [Symbol.asyncDispose]() {
    this.closings++;
    return this.closing.promise;
  }
}

/** A connection that does not close without an error. */
class Stuck implements AsyncDisposable {
  readonly error = new Error("stuck");
  [Symbol.asyncDispose]() {
    return Promise.reject(this.error);
  }
}

/** A call of an opener, for the test to answer. */
type Attempt<C> = PromiseWithResolvers<C> & { signal: AbortSignal };

/** An opener that answers when the test does. */
function control<C extends Disposable | AsyncDisposable = Fake>() {
  const attempts: Attempt<C>[] = [];
  const opener: Opener<C> = (signal) => {
    attempts.push({ ...Promise.withResolvers<C>(), signal });
    return attempts.at(-1)!.promise;
  };
  return { attempts, opener };
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

/** Lets all promises settle that can. */
async function settled(): Promise<void> {
  for (let i = 0; i < 50; i++) await null;
}

/** What the promise rejects with, whatever that is. */
function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    (value) => Promise.reject(new Error(`Fulfilled with ${value}`)),
    (reason) => reason,
  );
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

test("LazyConnection constructor opens nothing", () => {
  const { attempts, opener } = control();
  const lazy = new LazyConnection(opener);
  assertEquals(attempts.length, 0);
  assertEquals(lazy.current, undefined);
  assertEquals(new LazyConnection({ port: 1 }).current, undefined);
});

test("LazyConnection constructor infers the connection from its target", () => {
  const fromOptions: LazyConnection<Deno.TcpConn> = new LazyConnection(
    loopback,
  );
  const fromOpener: LazyConnection<Deno.FsFile> = new LazyConnection(() =>
    Deno.open("never")
  );
  // @ts-expect-error options give a TcpConn
  const wrong = new LazyConnection<Deno.TlsConn>(loopback);
  // @ts-expect-error an opener gives what can be disposed of
  const worse = new LazyConnection(() => Promise.resolve("text"));
  for (const lazy of [fromOptions, fromOpener, wrong, worse]) {
    assertEquals(lazy.current, undefined);
  }
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

test("LazyConnection.run() resolves to the result of the task", async () => {
  const lazy = new LazyConnection(control().opener);
  const sync: number = await lazy.run((a: number, b: number) => a + b, 1, 2);
  const async: string = await lazy.run((a: string) => Promise.resolve(a), "a");
  assertEquals([sync, async], [3, "a"]);
});

test("LazyConnection.run() rejects with the error of the task", async () => {
  const lazy = new LazyConnection(control().opener);
  const error = new Error("task");
  const thrown = lazy.run(() => {
    throw error;
  });
  assertStrictEquals(await rejection(thrown), error);
  const rejected = lazy.run(() => Promise.reject(error));
  assertStrictEquals(await rejection(rejected), error);
});

test("LazyConnection.run() gives each task a connection of its own", async () => {
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
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
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
  await lazy.run(async () => {
    const outer = await lazy.connect();
    const inner = await lazy.run(async () => {
      assertEquals(lazy.current, undefined);
      return await lazy.connect();
    });
    assertNotEquals<unknown>(inner.calls, []);
    assertStrictEquals(lazy.current, outer);
    assertEquals(outer.calls, []);
  });
});

test("LazyConnection.run() is one task with what it starts", async () => {
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
  await lazy.run(async () => {
    const conn = await lazy.connect();
    const seen = await Promise.all([
      delay(1).then(() => lazy.current),
      new Promise((resolve) => setTimeout(() => resolve(lazy.current), 1)),
      (async () => await lazy.current)(),
    ]);
    for (const current of seen) assertStrictEquals(current, conn);
  });
});

test("LazyConnection.run() closes a connection still open, then settles", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => Promise.resolve(slow));
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
  const lazy = new LazyConnection(() => Promise.resolve(slow));
  const run = lazy.run(async () => {
    const conn = await lazy.connect();
    conn[Symbol.asyncDispose]();
  });
  assert(await isPending(run));
  slow.closing.resolve();
  await run;
  assertEquals(slow.closings, 1);
});

test("LazyConnection.run() gives up a connect in flight, and waits for it", async () => {
  const { attempts, opener } = control<Slow>();
  const lazy = new LazyConnection(opener);
  let connect: Promise<unknown> | undefined;
  const run = lazy.run(() => {
    connect = rejection(lazy.connect());
  });
  assert(await isPending(run));
  const [attempt] = attempts;
  assertInstanceOf(attempt!.signal.reason, BadResource);

  const late = new Slow();
  attempt!.resolve(late);
  assert(await isPending(run));
  assertEquals(late.closings, 1);
  late.closing.resolve();
  await run;
  assertStrictEquals(await connect, attempt!.signal.reason);
});

test("LazyConnection.run() keeps the error of the task where closing fails too", async () => {
  const stuck = new Stuck();
  const lazy = new LazyConnection(() => Promise.resolve(stuck));
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

test("LazyConnection.run() rejects where closing fails", async () => {
  const stuck = new Stuck();
  const lazy = new LazyConnection(() => Promise.resolve(stuck));
  const run = lazy.run(async () => void await lazy.connect());
  assertStrictEquals(await rejection(run), stuck.error);
});

test("LazyConnection.connect() rejects once the task has ended", async () => {
  const { attempts, opener } = control();
  const lazy = new LazyConnection(opener);
  const leftover = await lazy.run(() => AsyncLocalStorage.snapshot());
  await assertRejects(
    () => leftover(() => lazy.connect()),
    BadResource,
    "Cannot connect: the task has ended",
  );
  assertEquals(leftover(() => lazy.current), undefined);
  assertEquals(attempts.length, 0);
  assertEquals(await leftover(() => lazy.run(() => 1)), 1);
});

test("LazyConnection.connect() works in the main task", async () => {
  const fake = new Fake();
  const lazy = new LazyConnection(() => Promise.resolve(fake));
  {
    await using conn = await lazy.connect();
    assertStrictEquals(conn, fake);
    assertStrictEquals(lazy.current, fake);
  }
  assertEquals(lazy.current, undefined);
});

test("LazyConnection.connect() rejects when already connected", async () => {
  const { attempts, opener } = control<Slow>();
  const lazy = new LazyConnection(opener);
  const refused = async () => {
    const error = await assertRejects(() => lazy.connect(), AlreadyExists);
    assertStringIncludes(error.message, "already connected");
    assertStringIncludes(error.message, "run()");
  };
  const connect = lazy.connect();
  await refused(); // opening

  const slow = new Slow();
  attempts[0]!.resolve(slow);
  const conn = await connect;
  await refused(); // open
  assertStrictEquals(lazy.current, slow);

  const closing = conn[Symbol.asyncDispose]();
  assertEquals(lazy.current, undefined);
  await refused(); // closing
  slow.closing.resolve();
  await closing;

  assertEquals(attempts.length, 1);
  lazy.connect();
  assertEquals(attempts.length, 2);
  attempts[1]!.resolve(slow);
});

test("LazyConnection.connect() is freed by using, await using and close()", async () => {
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
  const conns: Fake[] = [];
  {
    using conn = await lazy.connect();
    conns.push(conn);
  }
  {
    await using conn = await lazy.connect();
    conns.push(conn);
  }
  const conn = await lazy.connect();
  conns.push(conn);
  assertEquals(conn.close("now", 1), 2);
  await using _next = await lazy.connect();
  assertEquals(conns.map((conn) => conn.calls), [
    ["dispose"],
    ["asyncDispose"],
    ["close", "now", 1],
  ]);
});

test("LazyConnection.connect() makes a Disposable an AsyncDisposable", async () => {
  let disposals = 0;
  const disposable = { [Symbol.dispose]: () => void disposals++ };
  const lazy = new LazyConnection(() => Promise.resolve(disposable));
  {
    await using conn = await lazy.connect();
    assertStrictEquals(conn, disposable);
  }
  await (await lazy.connect())[Symbol.asyncDispose]();
  assertEquals(disposals, 2);
});

test("LazyConnection.connect() waits for a close() that is asynchronous", async () => {
  const { promise, resolve } = Promise.withResolvers<string>();
  const lazy = new LazyConnection(() =>
    Promise.resolve({ close: () => promise, [Symbol.dispose]() {} })
  );
  const conn = await lazy.connect();
  const closing = conn.close();
  await assertRejects(() => lazy.connect(), AlreadyExists);
  resolve("closed");
  assertEquals(await closing, "closed");
  await using _next = await lazy.connect();
});

test("LazyConnection.connect() waits for an AsyncDisposable with a thenable", async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  const thenable: PromiseLike<void> = {
    then: (...args) => promise.then(...args),
  };
  const lazy = new LazyConnection(() =>
    Promise.resolve({ [Symbol.asyncDispose]: () => thenable })
  );
  const closing = (await lazy.connect())[Symbol.asyncDispose]();
  await assertRejects(() => lazy.connect(), AlreadyExists);
  resolve();
  await closing;
  await using _next = await lazy.connect();
});

test("LazyConnection.connect() frees the task where closing fails", async () => {
  const error = new Error("close");
  const fail = () => {
    throw error;
  };
  const lazy = new LazyConnection(() =>
    Promise.resolve({
      close: fail,
      [Symbol.dispose]: fail,
      [Symbol.asyncDispose]: () => Promise.reject(error),
    })
  );
  for (const key of ["close", Symbol.dispose] as const) {
    const conn = await lazy.connect();
    assertStrictEquals(assertThrows(() => conn[key]()), error);
  }
  const conn = await lazy.connect();
  const closing = Promise.resolve(conn[Symbol.asyncDispose]());
  assertStrictEquals(await rejection(closing), error);
  await lazy.connect();
});

test("LazyConnection.connect() lets an object close itself by its own methods", async () => {
  const calls: string[] = [];
  class Client {
    close() {
      calls.push("close");
    }
    async [Symbol.asyncDispose]() {
      await delay(1);
      this.close();
      calls.push("asyncDispose");
    }
  }
  const lazy = new LazyConnection(() => Promise.resolve(new Client()));
  await lazy.run(() => lazy.connect());
  assertEquals(calls, ["close", "asyncDispose"]);
});

test("LazyConnection.connect() has no effect on what is closed already", async () => {
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
  const conn = await lazy.run(async () => {
    await using conn = await lazy.connect();
    using _conn = conn;
    conn.close();
    return conn;
  });
  assertEquals(conn.calls, ["close"]);
});

test("LazyConnection.connect() gives the object its methods back once it is closed", async () => {
  const literal = {
    closings: 0,
    close(_status: number) {
      this.closings++;
    },
    [Symbol.dispose]() {
      this.closings++;
    },
  };
  const { close, [Symbol.dispose]: dispose } = literal;
  const lazy = new LazyConnection(() => Promise.resolve(literal));
  const conn = await lazy.connect();
  assertNotEquals(literal.close, close);
  await conn[Symbol.asyncDispose]();
  assertStrictEquals(literal.close, close);
  assertStrictEquals(literal[Symbol.dispose], dispose);
  // It stays AsyncDisposable, for whoever has it next
  await conn[Symbol.asyncDispose]();
  assertEquals(literal.closings, 2);
  await lazy.run(() => lazy.connect());
  assertEquals(literal.closings, 3);
});

test("LazyConnection.connect() leaves a close alone that is no method", async () => {
  const status = {
    get close() {
      return true;
    },
    [Symbol.dispose]() {},
  };
  const lazy = new LazyConnection(() => Promise.resolve(status));
  {
    using conn = await lazy.connect();
    assertEquals(conn.close, true);
  }
  assertEquals(status.close, true);
});

test("LazyConnection.connect() has every disposal wait for the one that closes", async () => {
  const slow = new Slow();
  const lazy = new LazyConnection(() => Promise.resolve(slow));
  const conn = await lazy.connect();
  const disposals = [conn[Symbol.asyncDispose](), conn[Symbol.asyncDispose]()];
  for (const disposal of disposals) assert(await isPending(disposal));
  slow.closing.resolve();
  await Promise.all(disposals);
  assertEquals(slow.closings, 1);
});

test("LazyConnection.connect() is safe from the late disposal of an earlier one", async () => {
  const lazy = new LazyConnection(() => Promise.resolve(new Fake()));
  const early = await lazy.connect();
  early.close();
  const conn = await lazy.connect();
  early.close();
  early[Symbol.dispose]();
  await early[Symbol.asyncDispose]();
  assertStrictEquals(lazy.current, conn);
  assertEquals(conn.calls, []);
});

test("LazyConnection.connect() is safe from late disposal where an object is given again", async () => {
  const pooled = new Fake();
  const lazy = new LazyConnection(() => Promise.resolve(pooled));
  const { promise, resolve } = Promise.withResolvers<void>();
  const early = lazy.run(async () => {
    await using conn = await lazy.connect();
    conn.close();
    await promise;
  });
  await settled();
  await lazy.run(async () => {
    const conn = await lazy.connect();
    resolve();
    await early;
    assertStrictEquals(lazy.current, conn);
    assertEquals(pooled.calls, ["close"]);
  });
  assertEquals(pooled.calls, ["close", "asyncDispose"]);
});

test("LazyConnection.connect() takes an object given again any number of times", async () => {
  const pooled = new Fake();
  const lazy = new LazyConnection(() => Promise.resolve(pooled));
  for (let i = 0; i < 20_000; i++) (await lazy.connect()).close();
  assertEquals(pooled.calls.length, 20_000);
});

test("LazyConnection.connect() takes an object that another LazyConnection had", async () => {
  const pooled = new Fake();
  const pool = () => Promise.resolve(pooled);
  const [a, b] = [new LazyConnection(pool), new LazyConnection(pool)];
  for (const lazy of [a, b, a]) await lazy.run(() => lazy.connect());
  assertEquals(pooled.calls, Array(3).fill("asyncDispose"));

  using _conn = await a.connect();
  await assertRejects(() => b.connect(), Busy);
});

test("LazyConnection.connect() rejects an object that is another task's connection", async () => {
  const shared = new Fake();
  const lazy = new LazyConnection(() => Promise.resolve(shared));
  await lazy.run(async () => {
    const conn = await lazy.connect();
    await assertRejects(
      () => lazy.run(() => lazy.connect()),
      Busy,
      "Cannot connect: the opener gave",
    );
    assertStrictEquals(lazy.current, conn);
    assertEquals(shared.calls, []);
  });
  assertEquals(shared.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() passes the error of the opener through", async () => {
  const error = new Error("opener");
  const fake = new Fake();
  const openers: Opener<Fake>[] = [
    () => {
      throw error;
    },
    () => Promise.reject(error),
    () => Promise.resolve(fake),
  ];
  const lazy = new LazyConnection((signal) => openers.shift()!(signal));
  assertStrictEquals(await rejection(lazy.connect()), error);
  assertStrictEquals(await rejection(lazy.connect()), error);
  assertStrictEquals(await lazy.connect(), fake);
});

test("LazyConnection.connect() rejects what cannot be disposed of", async () => {
  const frozen = Object.freeze(new Fake());
  const given: unknown[] = [undefined, null, 1, {}, { close() {} }, frozen];
  const lazy = new LazyConnection(() => Promise.resolve(given.shift() as Fake));
  while (given.length > 0) {
    await assertRejects(() => lazy.connect(), TypeError);
    assertEquals(lazy.current, undefined);
  }
  assertEquals(frozen.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() is refused to the opener, run() is not", async () => {
  const fake = new Fake();
  const errors: unknown[] = [];
  let inner: Fake | undefined;
  const lazy: LazyConnection<Fake> = new LazyConnection(async () => {
    if (inner) return inner;
    inner = new Fake();
    errors.push(await rejection(lazy.connect()));
    assertEquals(lazy.current, undefined);
    assertStrictEquals(await lazy.run(() => lazy.connect()), inner);
    return fake;
  });
  assertStrictEquals(await lazy.connect(), fake);
  assertInstanceOf(errors[0], AlreadyExists);
  assertEquals(inner?.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() rejects where its opener disposes of everything", async () => {
  const fake = new Fake();
  let disposal: Promise<void> | undefined;
  const lazy: LazyConnection<Fake> = new LazyConnection(() => {
    disposal = lazy[Symbol.asyncDispose]();
    return Promise.resolve(fake);
  });
  await assertRejects(() => lazy.connect(), BadResource);
  await disposal;
  assertEquals(fake.calls, ["asyncDispose"]);
});

test("LazyConnection.connect() does not start with an aborted signal", async () => {
  const { attempts, opener } = control();
  const reason = { own: "reason" };
  const signal = AbortSignal.abort(reason);
  const lazy = new LazyConnection(opener);
  assertStrictEquals(await rejection(lazy.connect({ signal })), reason);
  const options = new LazyConnection({ port: 1, signal });
  assertStrictEquals(await rejection(options.connect()), reason);
  assertEquals(attempts.length, 0);
});

test("LazyConnection.connect() gives up with the reason of the signal", async () => {
  for (const reason of [new Error("enough"), "enough", null, 0]) {
    const lazy = new LazyConnection<Fake>(never);
    const controller = new AbortController();
    const connect = lazy.connect(controller);
    controller.abort(reason);
    assertStrictEquals(await rejection(connect), reason);
  }
  const { attempts, opener } = control();
  const lazy = new LazyConnection(opener);
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort(null);
  attempts[0]!.reject(new Error("an error of the opener's own"));
  assertStrictEquals(await rejection(connect), null);
});

test("LazyConnection.connect() gives up in time with AbortSignal.timeout()", async () => {
  const lazy = new LazyConnection<Fake>(never);
  const signal = AbortSignal.timeout(5);
  const error = await assertRejects(
    () => lazy.connect({ signal }),
    DOMException,
  );
  assertEquals(error.name, "TimeoutError");
});

test("LazyConnection.connect() waits for an opener that ignores its signal", async () => {
  const { attempts, opener } = control();
  const lazy = new LazyConnection(opener);
  const controller = new AbortController();
  const connect = rejection(lazy.connect(controller));
  controller.abort("enough");
  assert(await isPending(connect));
  await assertRejects(() => lazy.connect(), AlreadyExists);

  const late = new Fake();
  attempts[0]!.resolve(late);
  assertEquals(await connect, "enough");
  assertEquals(late.calls, ["asyncDispose"]);
  lazy.connect();
  assertEquals(attempts.length, 2);
});

test("LazyConnection.connect() closes what is given again too late", async () => {
  const { attempts, opener } = control();
  const lazy = new LazyConnection(opener);
  const pooled = new Fake();
  const first = lazy.connect();
  attempts[0]!.resolve(pooled);
  (await first).close();

  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort("enough");
  attempts[1]!.resolve(pooled);
  assertEquals(await rejection(connect), "enough");
  assertEquals(pooled.calls, ["close", "asyncDispose"]);
});

test("LazyConnection.connect() keeps the reason where closing fails too", async () => {
  const { attempts, opener } = control<Stuck>();
  const lazy = new LazyConnection(opener);
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  controller.abort("enough");
  const late = new Stuck();
  attempts[0]!.resolve(late);
  const both = await assertRejects(() => connect, SuppressedError);
  assertStrictEquals(both.suppressed, "enough");
  assertStrictEquals(both.error, late.error);
  lazy.connect();
  assertEquals(attempts.length, 2);
});

test("LazyConnection.connect() leaves its signals alone once it has settled", async () => {
  const controllers = [new AbortController(), new AbortController()];
  const [options, own] = controllers.map(({ signal }) => signal);
  let listeners = 0;
  for (const { signal } of controllers) {
    signal.addEventListener = () => listeners++;
    signal.removeEventListener = () => listeners--;
  }
  const { attempts, opener } = control();
  // A Fake will do for a TcpConn, and an attempt answers for it
  using _stub = stubConnect(({ signal }) =>
    opener(signal!) as Promise<unknown> as Promise<Deno.TcpConn>
  );
  const lazy = new LazyConnection({ port: 1, signal: options! });
  for (const settle of ["reject", "resolve"] as const) {
    const connect = lazy.connect({ signal: own! });
    assertEquals(listeners, 2);
    attempts.at(-1)![settle](new Fake());
    await connect.catch(() => {});
    assertEquals(listeners, 0);
  }
  for (const controller of controllers) controller.abort();
  assert(lazy.current);
  assertEquals(attempts[1]!.signal.aborted, false);
});

test("LazyConnection.connect() never aborts the opener's signal after it has opened", async () => {
  const { attempts, opener } = control<Slow>();
  const lazy = new LazyConnection(opener);
  const slow = new Slow();
  const run = lazy.run(async () => {
    const connect = lazy.connect();
    attempts[0]!.resolve(slow);
    await connect;
  });
  await isPending(run);
  const disposal = lazy[Symbol.asyncDispose]();
  slow.closing.resolve();
  await Promise.all([run, disposal]);
  assertEquals(attempts[0]!.signal.aborted, false);
});

test("LazyConnection.connect() heeds the signal of the options", async () => {
  using _stub = stubConnect(({ signal }) => never(signal!));
  const controller = new AbortController();
  const { signal } = controller;
  const lazy = new LazyConnection({ port: 1, signal });
  const connect = lazy.connect({ signal: AbortSignal.any([]) });
  controller.abort("enough");
  assertStrictEquals(await rejection(connect), "enough");
});

netTest(
  "LazyConnection.connect() gives a real TcpConn, to each task its own",
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

netTest(
  "LazyConnection.connect() gives what Deno.startTls() takes",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ port: listener.addr.port });
    await lazy.run(async () => {
      await using conn = await lazy.connect();
      using tls = await Deno.startTls(conn, { hostname: "localhost" });
      assertEquals(tls.remoteAddr.port, listener.addr.port);
    });
  },
);

netTest("LazyConnection.connect() closes a TcpConn in each way", async () => {
  using listener = Deno.listen(loopback);
  const lazy = new LazyConnection({ port: listener.addr.port });
  for (const key of ["close", Symbol.dispose, Symbol.asyncDispose] as const) {
    const conn = await lazy.connect();
    using server = await listener.accept();
    await conn[key]();
    assertEquals(await server.read(new Uint8Array(1)), null);
    await assertRejects(() => conn.write(new Uint8Array(1)), BadResource);
  }
});

netTest(
  "LazyConnection.connect() is given up at once over a socket",
  async () => {
    using listener = Deno.listen(loopback);
    const lazy = new LazyConnection({ port: listener.addr.port });
    const controller = new AbortController();
    const connect = lazy.connect(controller);
    controller.abort("enough");
    assertStrictEquals(await rejection(connect), "enough");
    await using _conn = await lazy.connect();
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
    assertStrictEquals(await rejection(lazy.connect(controller)), "enough");
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
      await lazy.current?.write(new TextEncoder().encode(`task ${id}`));
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

test("LazyConnection[Symbol.asyncDispose]() closes and gives up everything", async () => {
  const { attempts, opener } = control<Slow>();
  const lazy = new LazyConnection(opener);
  const open = [new Slow(), new Slow()];
  const main = lazy.connect();
  attempts[0]!.resolve(open[0]!);
  await main;
  const end = Promise.withResolvers<void>();
  const task = lazy.run(async () => {
    const connect = lazy.connect();
    attempts[1]!.resolve(open[1]!);
    await connect;
    await end.promise;
  });
  const opening = rejection(lazy.run(() => lazy.connect()));
  await settled();

  const disposal = lazy[Symbol.asyncDispose]();
  assertEquals(open.map((slow) => slow.closings), [1, 1]);
  assertInstanceOf(attempts[2]!.signal.reason, BadResource);
  assertEquals(lazy.current, undefined);
  const message = "the LazyConnection has been disposed of";
  await assertRejects(() => lazy.connect(), BadResource, message);
  let started = false;
  const run = () => lazy.run(() => started = true);
  await assertRejects(run, BadResource, message);
  assertEquals(started, false);

  const again = lazy[Symbol.asyncDispose]();
  for (const slow of open) slow.closing.resolve();
  assert(await isPending(disposal));
  assert(await isPending(again));
  const late = new Slow();
  attempts[2]!.resolve(late);
  late.closing.resolve();
  await Promise.all([disposal, again]);
  assertStrictEquals(await opening, attempts[2]!.signal.reason);
  assertEquals([...open, late].map((slow) => slow.closings), [1, 1, 1]);
  end.resolve();
  await task;
  await lazy[Symbol.asyncDispose]();
});

test("LazyConnection[Symbol.asyncDispose]() reports every error of closing", async () => {
  const stuck = Array.from({ length: 3 }, () => new Stuck());
  const slow = new Slow();
  const opener = [...stuck, slow].values();
  const lazy = new LazyConnection(() => Promise.resolve(opener.next().value!));
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

  const one = new LazyConnection(() => Promise.resolve(stuck[0]!));
  await one.connect();
  const disposal = one[Symbol.asyncDispose]();
  assertStrictEquals(await rejection(disposal), stuck[0]!.error);
});

test("LazyConnection[Symbol.asyncDispose]() can be awaited by a task", async () => {
  const fake = new Fake();
  const lazy = new LazyConnection(() => Promise.resolve(fake));
  await lazy.run(async () => {
    await using _conn = await lazy.connect();
    await lazy[Symbol.asyncDispose]();
    assertEquals(lazy.current, undefined);
  });
  assertEquals(fake.calls, ["asyncDispose"]);
});

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
  close() {
    if (this.state === "closing") return; // as a socket's, it may be called then
    assertEquals(this.state, "open");
    this.state = "closed";
  }
  [Symbol.dispose]() {
    this.close();
  }
  async [Symbol.asyncDispose]() {
    assertEquals(this.state, "open");
    this.state = "closing";
    await this.closing.promise;
    this.state = "closed";
  }
}

/** What the schedule knows of a task, without asking the LazyConnection. */
class Actor {
  state: "free" | "opening" | "open" | "closing" = "free";
  ended = false;
  /** Calls a function inside the task. */
  enter = <T>(fn: () => T): T => fn();
  readonly end = Promise.withResolvers<void>();
  run: Promise<void> = this.end.promise;
  controller = new AbortController();
  attempt: Attempt<Client> | undefined;
  heeds = false;
  givenUp = false;
  client: Client | undefined;
  /** How the last connect is to settle, and how it did. */
  expected: unknown;
  outcome: unknown;
}

/** Drives random steps, and checks after each that what must hold does hold. */
async function schedule(seed: number, log: string[]): Promise<void> {
  const pick = random(seed);
  const clients: Client[] = [];
  const late: (() => unknown)[] = [];
  let calling: Actor | undefined;
  let disposal: Promise<void> | undefined;
  const lazy = new LazyConnection<Client>((signal) => {
    const actor = calling!;
    // Never a second one
    assertEquals([actor.attempt, actor.client], [undefined, undefined]);
    actor.attempt = { ...Promise.withResolvers<Client>(), signal };
    if (actor.heeds) {
      signal.addEventListener("abort", () => {
        actor.attempt!.reject(signal.reason);
        actor.attempt = undefined;
        actor.state = "free";
      });
    }
    return actor.attempt.promise;
  });
  const main = new Actor();
  const start = () => {
    const actor = new Actor();
    actor.run = lazy.run(() => {
      actor.enter = AsyncLocalStorage.snapshot();
      return actor.end.promise;
    });
    return actor;
  };
  const actors = [main, start(), start(), start()];

  const giveUp = (actor: Actor, reason: unknown) => {
    if (actor.state !== "opening" || actor.givenUp) return;
    actor.givenUp = true;
    actor.expected = reason;
  };
  const closeSlowly = (actor: Actor) => {
    if (actor.state === "open") actor.state = "closing";
  };
  const steps: Record<string, (actor: Actor) => void> = {
    connect(actor) {
      const { state, attempt } = actor;
      if (state === "free") {
        actor.controller = new AbortController();
        actor.heeds = pick(2) === 0;
        actor.givenUp = false;
        actor.client = undefined;
      }
      calling = actor;
      const connect = actor.enter(() => lazy.connect(actor.controller));
      calling = undefined;
      const refused = disposal || actor.ended
        ? BadResource
        : state !== "free"
        ? AlreadyExists
        : undefined;
      if (refused) {
        assertStrictEquals(actor.attempt, attempt);
        refusals.push(assertRejects(() => connect, refused));
        return;
      }
      assert(actor.attempt);
      actor.state = "opening";
      actor.expected = actor.outcome = undefined;
      connect.then((value) => actor.outcome = value, (error) => {
        actor.outcome = error;
      });
    },
    resolve(actor) {
      if (!actor.attempt) return;
      const pooled = clients.filter(({ state }) => state === "closed");
      actor.client = pick(2) === 0 ? pooled[pick(pooled.length)] : undefined;
      if (!actor.client) clients.push(actor.client = new Client());
      actor.client.open();
      if (!actor.givenUp) actor.expected = actor.client;
      actor.state = actor.givenUp ? "closing" : "open";
      actor.attempt.resolve(actor.client);
      actor.attempt = undefined;
    },
    reject(actor) {
      if (!actor.attempt) return;
      const error = new Error("opener");
      if (!actor.givenUp) actor.expected = error;
      actor.state = "free";
      actor.attempt.reject(error);
      actor.attempt = undefined;
    },
    abort(actor) {
      const reason = new Error("abort");
      giveUp(actor, reason);
      actor.controller.abort(reason);
    },
    close(actor) {
      if (actor.state !== "open") return;
      const conn = actor.client!;
      late.push(conn.close, conn[Symbol.dispose], conn[Symbol.asyncDispose]);
      const how = pick(3);
      actor.state = how === 2 ? "closing" : "free";
      if (how === 0) conn.close();
      if (how === 1) conn[Symbol.dispose]();
      if (how === 2) conn[Symbol.asyncDispose]();
    },
    finishClosing(actor) {
      if (actor.state !== "closing") return;
      actor.client!.closing.resolve();
      actor.state = "free";
    },
    closeLate() {
      late[pick(late.length)]?.();
    },
    end(actor) {
      if (actor === main || actor.ended) return;
      actor.ended = true;
      giveUp(actor, BadResource);
      closeSlowly(actor);
      actor.end.resolve();
    },
    restart(actor) {
      const i = actors.indexOf(actor);
      if (disposal || !actor.ended || actor.state !== "free") return;
      actors[i] = start();
    },
    dispose(actor) {
      if (actor !== main || pick(4) > 0) return;
      for (const actor of actors) {
        giveUp(actor, BadResource);
        closeSlowly(actor);
      }
      disposal = lazy[Symbol.asyncDispose]();
    },
  };
  const refusals: Promise<unknown>[] = [];
  const check = async () => {
    await settled();
    await Promise.all(refusals.splice(0));
    for (const [i, actor] of actors.entries()) {
      const { state, client, expected, outcome } = actor;
      const at = `task ${i}, ${state}`;
      const open = state === "open" ? client : undefined;
      assertStrictEquals(actor.enter(() => lazy.current), open, at);
      if (open) assertEquals(open.state, "open", at);
      if (state === "closing") assertEquals(client!.state, "closing", at);
      if (state === "free" || state === "open") {
        if (expected === BadResource) {
          assertInstanceOf(outcome, BadResource, at);
        } else assertStrictEquals(outcome, expected, at);
      }
      const settled = actor.ended && state === "free";
      if (actor !== main) {
        assertEquals(!await isPending(actor.run), settled, at);
      }
    }
    const held = actors.filter(({ state }) =>
      state === "open" || state === "closing"
    );
    const unclosed = clients.filter(({ state }) => state !== "closed");
    assertEquals(new Set(unclosed), new Set(held.map(({ client }) => client!)));
    if (disposal) {
      const free = actors.every(({ state }) => state === "free");
      assertEquals(!await isPending(disposal), free);
    }
  };
  const names = Object.keys(steps);
  const step = async (name: string, actor: Actor) => {
    log.push(`${name} ${actors.indexOf(actor)}`);
    steps[name]!(actor);
    await check();
  };
  for (let i = 0; i < 60; i++) {
    await step(names[pick(names.length)]!, actors[pick(actors.length)]!);
  }
  // Whatever is left over comes to its end
  disposal ??= lazy[Symbol.asyncDispose]();
  for (const actor of actors) actor.attempt?.reject(new Error("over"));
  for (const client of clients) client.closing.resolve();
  for (const actor of actors) actor.end.resolve();
  await Promise.all([disposal, ...actors.map((actor) => actor.run)]);
  assert(clients.every(({ state }) => state === "closed"));
}

test("LazyConnection keeps its promises whatever the schedule", async () => {
  const seed = Deno.args[0];
  const first = seed === undefined ? Date.now() % 1e9 : Number(seed);
  const count = seed === undefined ? 300 : 1;
  for (let seed = first; seed < first + count; seed++) {
    const log: string[] = [];
    try {
      await schedule(seed, log);
    } catch (cause) {
      const replay = `deno task test -- ${seed}`;
      throw new Error(`Replay with ${replay}: ${log.join(", ")}`, { cause });
    }
  }
});

netTest("demo shows two connections that are open at once", async () => {
  const lines: string[] = [];
  await main([], (line) => lines.push(line));
  const [a, b, both, ...got] = lines;
  const from = /^task [12]: connected from (127\.0\.0\.1:\d+)$/;
  assertNotEquals(a!.match(from)![1], b!.match(from)![1]);
  assertEquals(both, "both connections are open");
  const sizes = got.map((line) =>
    line.match(/^task [12]: Got (\d+) bytes$/)![1]
  );
  assertEquals(sizes.length, 2);
  assertEquals(sizes[0], sizes[1]);
});

netTest("demo counts the bytes of the whole response of a server", async () => {
  const response = "HTTP/1.0 200 OK\r\n\r\nHello";
  using listener = Deno.listen(loopback);
  const requests: string[] = [];
  const serving = (async () => {
    for (let i = 0; i < 2; i++) {
      using conn = await listener.accept();
      const buffer = new Uint8Array(1_000);
      const length = await conn.read(buffer) ?? 0;
      requests.push(new TextDecoder().decode(buffer.subarray(0, length)));
      await conn.write(new TextEncoder().encode(response));
    }
  })();
  const lines: string[] = [];
  const port = String(listener.addr.port);
  await main(["127.0.0.1", port], (line) => lines.push(line));
  await serving;
  const got = lines.filter((line) =>
    line.endsWith(`: Got ${response.length} bytes`)
  );
  assertEquals(got.length, 2);
  const request = "GET /index.html HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n";
  assertEquals(requests, [request, request]);
});

test("demo says in one line what is wrong", async () => {
  const wrong = [
    ["127.0.0.1"],
    ["127.0.0.1", "80", "90"],
    ["", "80"],
    ["127.0.0.1", "0"],
    ["127.0.0.1", "65536"],
    ["127.0.0.1", "http"],
    ["127.0.0.1", "-1"],
  ];
  for (const args of wrong) {
    const error = await assertRejects(() => main(args, () => {}), Error);
    assert(/^Cannot .+$/.test(error.message), error.message);
  }
  using _stub = stubConnect(() => Promise.reject(new Error("no")));
  await assertRejects(
    () => main(["127.0.0.1", "80"], () => {}),
    Error,
    "Cannot fetch from 127.0.0.1:80: no",
  );
});
