// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertMatch,
  assertNotStrictEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { delay } from "@std/async/delay";
import { main } from "./demo.ts";
import { LazyConnection, type Opener } from "./mod.ts";

const { AlreadyExists, BadResource, Busy, NotConnected } = Deno.errors;
const DISPOSED = "Cannot use the LazyConnection: it has been disposed of";
const ENDED = "the task has ended, start another with run()";
const NOT_LENT = "Cannot get a connection: its opener is over, and has lent " +
  "none, it must `await lend(connection)`";
const OVER = "Cannot use the connection: its opener was over before the " +
  "task, it must `await lend(connection)`";

/** A test that ends, and leaves nothing open and `Deno.connect` as it was. */
function test(name: string, fn: (t: Deno.TestContext) => Promise<void>) {
  Deno.test({
    name,
    sanitizeOps: true,
    sanitizeResources: true,
    async fn(t) {
      const { connect } = Deno;
      const { promise: late, reject } = Promise.withResolvers<never>();
      const timer = setTimeout(reject, 10_000, new Error("The test hangs"));
      try {
        await Promise.race([fn(t), late]);
      } finally {
        clearTimeout(timer);
        Deno.connect = connect;
      }
    },
  });
}

/** A test of real sockets, which is ignored where they are not permitted. */
function netTest(name: string, fn: (t: Deno.TestContext) => Promise<void>) {
  const net = Deno.permissions.querySync({ name: "net", host: "127.0.0.1" });
  if (net.state === "granted") test(name, fn);
  else Deno.test.ignore(`${name} (needs --allow-net)`, fn);
}

/** A connection with a private field, which a proxy does not have. */
class Fake {
  #sent: string[] = [];
  outcome: unknown = "open";
  get sent(): string[] {
    return this.#sent;
  }
  query(sql: string): number {
    return this.#sent.push(sql);
  }
}

/** Lends a `Fake`, which learns how `lend()` ended, and passes that on. */
async function opener(lend: (fake: Fake) => Promise<void>): Promise<void> {
  const fake = new Fake();
  try {
    await lend(fake);
    fake.outcome = "committed";
  } catch (error) {
    fake.outcome = error;
    throw error;
  }
}

/** A `LazyConnection` whose opener does what the test says, call by call. */
function driven<C extends object = Fake>() {
  type Call = PromiseWithResolvers<void> & {
    lend: (connection: C) => Promise<void>;
    signal: AbortSignal;
  };
  const calls: Call[] = [];
  const lazy = new LazyConnection<C>((lend, signal) => {
    const call = { lend, signal, ...Promise.withResolvers<void>() };
    calls.push(call);
    return call.promise;
  });
  return { lazy, calls };
}

/** What `Deno.connect` opens in most tests, without a network. */
class Socket {
  closed = 0;
  [Symbol.dispose]() {
    this.closed++;
  }
}

/** A `LazyConnection` made from options, and the sockets that it opens. */
function ofSockets() {
  const sockets: Socket[] = [];
  stubConnect(() => Promise.resolve(sockets[sockets.push(new Socket()) - 1]!));
  return { lazy: new LazyConnection({ port: 1 }), sockets };
}

/** Replaces `Deno.connect` until the end of the test. */
function stubConnect(
  connect: (options: Deno.ConnectOptions) => Promise<object>,
) {
  // It has overloads that no arrow function has
  Deno.connect = connect as typeof Deno.connect;
}

/** Lets all promises settle that can: no chain of ours is that long. */
async function settled(): Promise<void> {
  for (let i = 0; i < 50; i++) await null;
}

/** Whether a promise is pending once all others have settled that can. */
async function isPending(promise: PromiseLike<unknown>): Promise<boolean> {
  let pending = true;
  const settle = () => pending = false;
  promise.then(settle, settle);
  await settled();
  return pending;
}

/** What a promise rejects with, which need not be an `Error`. */
async function reasonOf(promise: PromiseLike<unknown>): Promise<unknown> {
  const [settled] = await Promise.allSettled([promise]);
  if (settled.status === "rejected") return settled.reason;
  throw new Error("The promise did not reject");
}

/** A function that throws. */
function throws(error: unknown): () => never {
  return () => {
    throw error;
  };
}

/** Runs the garbage collector; before Deno 2.9 it cannot be had. */
let gc: (() => void) | undefined;
try {
  setFlagsFromString("--expose-gc");
  gc = runInNewContext("gc");
} catch { /* isCollected() gives the benefit of the doubt */ }

/** Whether an object that is made and left is garbage. */
async function isCollected(make: () => object | Promise<object>) {
  let collected = false;
  const registry = new FinalizationRegistry(() => collected = true);
  registry.register(await make(), undefined);
  await delay(0); // the stack has it no more
  gc?.();
  await delay(10);
  return collected || !gc;
}

// new LazyConnection()

test("LazyConnection constructor opens nothing", async () => {
  const { lazy, calls } = driven();
  assertEquals(lazy.current, undefined);
  await lazy.run(() => {});
  assertEquals(calls, []);
});

test("LazyConnection constructor takes an opener that lends, or options for sockets", () => {
  const lazy: LazyConnection<Deno.TcpConn> = new LazyConnection({ port: 1 });
  const wider: LazyConnection<Disposable> = lazy;
  const openers: Opener<Fake>[] = [opener, (lend) => lend(new Fake())];
  // @ts-expect-error options give a TcpConn
  new LazyConnection<Deno.TlsConn>({ port: 1 });
  // @ts-expect-error an opener lends, it returns nothing
  new LazyConnection<Fake>(() => Promise.resolve(new Fake()));
  // @ts-expect-error an opener lends what the LazyConnection is for
  new LazyConnection<Fake>((lend) => lend(new Date()));
  assertEquals([wider.current, openers.length], [undefined, 2]);
  return Promise.resolve();
});

test("LazyConnection constructor copies its options", async () => {
  const ports: number[] = [];
  stubConnect(({ port }) => {
    ports.push(port);
    return Promise.resolve(new Socket());
  });
  const options = { port: 1 };
  const lazy = new LazyConnection(options);
  options.port = 2;
  using _conn = await lazy.connect();
  assertEquals(ports, [1]);
});

// run(): what a task is

test("LazyConnection.run() resolves to the result of the function", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const sync: number = await lazy.run((a: number, b: number) => a + b, 1, 2);
  const async: string = await lazy.run((a: string) => Promise.resolve(a), "a");
  const either: number | string = await lazy.run(() =>
    sync > 9 ? 1 : Promise.resolve("b")
  );
  assertEquals([sync, async, either], [3, "a", "b"]);
});

test("LazyConnection.run() runs a lazy thenable inside the task", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const query: PromiseLike<Fake | undefined> = {
    then: (...args) => lazy.get().then(() => lazy.current).then(...args),
  };
  for (const run of [lazy.run, lazy.runOrJoin]) {
    assertInstanceOf(await run.call(lazy, () => query), Fake);
  }
});

test("LazyConnection.run() gives each task a connection of its own", async () => {
  const fakes: Fake[] = [];
  const lazy = new LazyConnection<Fake>((lend) =>
    opener((fake) => lend(fakes[fakes.push(fake) - 1]!))
  );
  const task = async () => {
    assertEquals(lazy.current, undefined);
    const fake = await lazy.get();
    await delay(1);
    assertStrictEquals(lazy.current, fake);
    fake.query("one");
    assertEquals(fake.sent, ["one"]);
    return fake;
  };
  await lazy.run(async () => {
    const outer = await task();
    await Promise.all([lazy.run(task), lazy.run(task)]);
    const outcomes = fakes.map(({ outcome }) => outcome);
    assertEquals(outcomes, ["open", "committed", "committed"]);
    assertStrictEquals(lazy.current, outer);
  });
  assertEquals(lazy.current, undefined);
});

test("LazyConnection.run() is one task with what it starts", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const target = new EventTarget();
  await lazy.run(async () => {
    const fake = await lazy.get();
    const seen = await Promise.all([
      delay(1).then(() => lazy.current),
      new Promise((resolve) => setTimeout(() => resolve(lazy.current), 1)),
      new Promise((resolve) => queueMicrotask(() => resolve(lazy.current))),
      (async () => await lazy.current)(),
    ]);
    for (const current of seen) assertStrictEquals(current, fake);
    target.addEventListener("a", () => seen.push(lazy.current));
    // A listener runs in the task that dispatches to it
    await lazy.run(() => target.dispatchEvent(new Event("a")));
    assertEquals(seen.at(-1), undefined);
  });
});

test("LazyConnection.run() leaves nothing to what outlives it, however it ended", async () => {
  for (const error of [undefined, new Error("task")]) {
    const { lazy, sockets } = ofSockets();
    let leftover!: ReturnType<typeof AsyncLocalStorage.snapshot>;
    const run = lazy.run(async () => {
      await lazy.get();
      leftover = AsyncLocalStorage.snapshot();
      if (error) throw error;
    });
    assertStrictEquals(await run.catch((error) => error), error);
    assertEquals(sockets.splice(0).map(({ closed }) => closed), [1]);
    const message = `Cannot connect: ${ENDED}`;
    await assertRejects(() => leftover(() => lazy.get()), BadResource, message);
    const connect = leftover(() => lazy.connect());
    await assertRejects(() => connect, BadResource, message);
    assertEquals(leftover(() => lazy.current), undefined);
    assertEquals(sockets.length, 0);
    await leftover(() => lazy.run(() => lazy.get()));
    assertEquals(sockets.length, 1);
  }
});

// run(): how a task ends

test("LazyConnection.run() waits for the opener to close, then resolves", async () => {
  const { lazy, calls } = driven();
  let lent: Promise<void> | undefined;
  const run = lazy.run(async () => {
    const get = lazy.get();
    lent = calls[0]!.lend(new Fake());
    await get;
    return "done";
  });
  assert(await isPending(run));
  assertEquals(await lent, undefined);
  calls[0]!.resolve();
  assertEquals(await run, "done");
});

test("LazyConnection.run() closes inside the task, which has ended", async () => {
  const lazy: LazyConnection<Fake> = new LazyConnection<Fake>(async (lend) => {
    await opener(lend);
    assertEquals(lazy.current, undefined);
    await assertRejects(() => lazy.get(), BadResource, ENDED);
    const join = lazy.runOrJoin(() => {});
    await assertRejects(() => join, BadResource, ENDED);
  });
  await lazy.run(() => lazy.get());
});

test("LazyConnection.run() and lend() reject with the very error of the function", async () => {
  for (const error of [new Error("task"), "task", null, undefined]) {
    for (const fail of [() => Promise.reject(error), throws(error)]) {
      let lent: Promise<void> | undefined;
      const lazy = new LazyConnection<Fake>((lend) => lent = lend(new Fake()));
      const run = lazy.run(async () => {
        await lazy.get();
        await fail();
      });
      assertStrictEquals(await reasonOf(run), error);
      assertStrictEquals(await reasonOf(lent!), error);
      assertStrictEquals(await reasonOf(lazy.run(fail)), error);
    }
  }
});

test("LazyConnection.run() rejects with what closing fails with, alone or with the function's error", async (t) => {
  const task = new Error("task");
  const other = new Error("other");
  const has = new Error("has", { cause: task });
  const suppressed = new SuppressedError(other, task);
  const wrapper = new Error("wrapper", { cause: other });
  const both = Symbol("both");
  const none = Symbol("none");
  const cases: Record<string, [own: unknown, closing: unknown, got: unknown]> =
    {
      "closing alone": [none, other, other],
      "closing alone, with nothing": [none, undefined, undefined],
      "the function's again": [task, task, task],
      "what has it as its cause": [task, has, has],
      "what has suppressed it": [task, suppressed, suppressed],
      "the cause of the function's": [wrapper, other, wrapper],
      "another one": [task, other, both],
      "what has another cause": [task, wrapper, both],
      "what has suppressed another": [other, suppressed, both],
      "nothing, and an error without a cause": [undefined, other, both],
      "the other way round": [other, undefined, both],
    };
  for (const [name, [own, closing, got]] of Object.entries(cases)) {
    await t.step(name, async () => {
      const lazy = new LazyConnection<Fake>(async (lend) => {
        await opener(lend).catch(() => {});
        throw closing;
      });
      const run = lazy.run(async () => {
        await lazy.get();
        if (own !== none) throw own;
      });
      const reason = await reasonOf(run);
      if (got !== both) return assertStrictEquals(reason, got);
      assertBoth(reason, own, closing);
    });
  }
});

/** Asserts that an error says of two that the later suppressed the earlier. */
function assertBoth(both: unknown, earlier: unknown, later: unknown) {
  assertInstanceOf(both, SuppressedError);
  // Not narrowed where std comes without types
  const { error, suppressed, message } = both as SuppressedError;
  assertStringIncludes(message, "it failed, and so did its opener");
  assertStrictEquals(error, later);
  assertStrictEquals(suppressed, earlier);
}

test("LazyConnection.run() cancels an attempt to connect, and does not wait for it", async () => {
  const { lazy, calls } = driven();
  let got: Promise<Fake> | undefined;
  const error = new Error("400");
  const run = lazy.run(() => {
    got = lazy.get(); // nobody awaits it yet, and the process goes on
    throw error;
  });
  assertStrictEquals(await reasonOf(run), error);
  const message = `Cannot connect: ${ENDED}`;
  const reason = await assertRejects(() => got!, BadResource, message);
  assertStrictEquals(calls[0]!.signal.reason, reason);
  assertStrictEquals(await reasonOf(calls[0]!.lend(new Fake())), reason);
  calls[0]!.reject(new Error("of an opener that nobody waits for"));
});

// runOrJoin()

test("LazyConnection.runOrJoin() is a part of the task, or a task where there is none", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const part = (...args: number[]) =>
    lazy.runOrJoin(async (...args) => {
      const fake = await lazy.get();
      return fake.query(args.join());
    }, ...args);
  assertEquals(await part(1, 2), 1);
  await lazy.run(async () => {
    assertEquals(await Promise.all([part(1), part(2)]), [1, 2]);
    assertEquals((await lazy.get()).sent, ["1", "2"]);
  });
});

test("LazyConnection.runOrJoin() fails the whole task, even if its error was caught", async () => {
  const error = new Error("part");
  const { lazy, calls } = driven();
  let lent: Promise<void> | undefined;
  const run = lazy.run(async () => {
    lazy.get();
    lent = calls[0]!.lend(new Fake());
    const part = lazy.runOrJoin(throws(error));
    assertStrictEquals(await reasonOf(part), error);
    assert(await isPending(lent));
  });
  assertStrictEquals(await reasonOf(lent!), error);
  calls[0]!.resolve();
  assertStrictEquals(await reasonOf(run), error);
});

test("LazyConnection.runOrJoin() leaves an error to be translated, by the task or by an outer part", async () => {
  const translated = new Error("translated");
  const lazy = new LazyConnection<Fake>(opener);
  const translate = async () => {
    await lazy.get();
    await lazy.runOrJoin(throws(new Error("part"))).catch(() => {});
    throw translated;
  };
  assertStrictEquals(await reasonOf(lazy.run(translate)), translated);
  const outer = lazy.run(() => lazy.runOrJoin(translate).catch(() => {}));
  assertStrictEquals(await reasonOf(outer), translated);
});

test("LazyConnection.runOrJoin() calls nothing in a task that has ended", async () => {
  const { lazy, calls } = driven();
  const leftover = await lazy.run(() => AsyncLocalStorage.snapshot());
  const called = () => assert(false);
  await assertRejects(
    () => leftover(() => lazy.runOrJoin(called)),
    BadResource,
    `Cannot join: ${ENDED}`,
  );
  assertEquals(calls.length, 0);
});

test("LazyConnection.runOrJoin() fails a task that ends before it has settled", async () => {
  const { promise, reject } = Promise.withResolvers<never>();
  const lazy = new LazyConnection<Fake>(opener);
  let loser: Promise<never> | undefined;
  const run = lazy.run(async () => {
    await lazy.get();
    loser = lazy.runOrJoin(() => promise);
    await Promise.race([loser, lazy.runOrJoin(() => 1)]);
  });
  const message = "Cannot end the task: a part of it is pending, " +
    "await each runOrJoin()";
  await assertRejects(() => run, TypeError, message);
  reject("late"); // which nobody but its caller hears
  assertEquals(await reasonOf(loser!), "late");
});

test("LazyConnection.runOrJoin() leaves a task that ends before it the error of its own, or of another part", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const error = new Error("task");
  const never = () => new Promise(() => {});
  const own = lazy.run(() => {
    lazy.runOrJoin(never);
    throw error;
  });
  assertStrictEquals(await reasonOf(own), error);
  const part = lazy.run(async () => {
    lazy.runOrJoin(never);
    await lazy.runOrJoin(throws(error)).catch(() => {});
  });
  assertStrictEquals(await reasonOf(part), error);
});

// get()

test("LazyConnection.get() opens one connection for all who ask", async () => {
  const { lazy, calls } = driven();
  await lazy.run(async () => {
    const deep = async () => await lazy.get();
    const gets = [lazy.get(), deep(), delay(0).then(() => lazy.get())];
    assertEquals(calls.length, 1);
    await delay(1);
    calls[0]!.lend(new Fake()).then(calls[0]!.resolve);
    for (const got of [...await Promise.all(gets), await lazy.get()]) {
      assertInstanceOf(got, Fake);
      assertStrictEquals(got, lazy.current);
    }
  });
  assertEquals(calls.length, 1);
});

test("LazyConnection.get() gives outside of run() the socket of connect(), and opens nothing", async () => {
  const { lazy, sockets } = ofSockets();
  const message = "Cannot get a connection: there is no task, call run() first";
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(sockets.length, 0);
  const connect = lazy.connect();
  const early = lazy.get();
  {
    using conn = await connect;
    assertStrictEquals(await early, conn);
    assertStrictEquals(await lazy.get(), conn);
    await lazy.run(() => assertEquals(lazy.current, undefined));
  }
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(sockets.length, 1);
  await lazy[Symbol.asyncDispose]();
  await assertRejects(() => lazy.get(), BadResource, DISPOSED);
});

test("LazyConnection.get() fails for all who wait if the opener fails, then tries again", async (t) => {
  const error = new Error("opener");
  const openers: Record<string, Opener<Fake>> = {
    "by throwing": throws(error),
    "by rejecting": () => Promise.reject(error),
    "by rejecting late": () => settled().then(throws(error)),
    "by never lending": () => Promise.resolve(),
  };
  for (const [name, failing] of Object.entries(openers)) {
    await t.step(name, async () => {
      let calls = 0;
      const lazy = new LazyConnection<Fake>((lend, signal) =>
        calls++ ? opener(lend) : failing(lend, signal)
      );
      await lazy.run(async () => {
        const get = lazy.get();
        const gets = name === "by throwing" ? [get] : [get, lazy.get()];
        await delay(0); // nobody awaits them yet, and the process goes on
        for (const reason of await Promise.all(gets.map(reasonOf))) {
          if (name !== "by never lending") assertStrictEquals(reason, error);
          else assertOver(reason, NOT_LENT);
        }
        assertInstanceOf(await lazy.get(), Fake);
      });
      assertEquals(calls, 2);
    });
  }
});

test("LazyConnection is loud about wrong use that nobody awaits", async () => {
  const unhandled: unknown[] = [];
  const listener = (event: PromiseRejectionEvent) => {
    event.preventDefault();
    unhandled.push(event.reason);
  };
  addEventListener("unhandledrejection", listener);
  const { lazy } = ofSockets();
  lazy.get();
  lazy.run(throws("run"));
  lazy.runOrJoin(throws("runOrJoin"));
  using _conn = await lazy.connect();
  lazy.connect();
  new LazyConnection<Deno.TcpConn>(() => Promise.resolve()).connect();
  await delay(1);
  removeEventListener("unhandledrejection", listener);
  const names = unhandled.map((e) => e instanceof Error ? e.name : e);
  const expected = ["NotConnected", "run", "runOrJoin", "AlreadyExists"];
  assertEquals(new Set(names), new Set([...expected, "TypeError"]));
});

// connect() and its block

test("LazyConnection.connect() and get() give a socket that each way to dispose of it closes at once", async (t) => {
  type Way = (open: () => Promise<Deno.TcpConn>) => Promise<void>;
  const ways: Record<string, Way> = {
    async "using"(open) {
      using _conn = await open();
    },
    async "await using"(open) {
      await using _conn = await open();
    },
    async "[Symbol.dispose]()"(open) {
      const conn = await open();
      conn[Symbol.dispose]();
      conn[Symbol.dispose]();
    },
  };
  for (const [name, way] of Object.entries(ways)) {
    await t.step(name, async () => {
      const { lazy, sockets } = ofSockets();
      const connect = () => lazy.connect();
      const get = () => lazy.get();
      await way(connect);
      await lazy.run(async () => {
        for (const open of [connect, get, connect]) {
          const left = way(open);
          await settled();
          assertEquals(lazy.current, undefined);
          await left;
        }
      });
      assertEquals(sockets.length, 4);
      await settled();
      for (const { closed } of sockets) assert(closed > 0);
    });
  }
});

test("LazyConnection.connect() gives the very socket, which is closed and gone once it is disposed of", async () => {
  const { lazy, sockets } = ofSockets();
  const conn = await lazy.connect();
  assertStrictEquals<unknown>(conn, sockets[0]);
  assertStrictEquals(lazy.current, conn);
  conn[Symbol.dispose]();
  assertEquals([sockets[0]!.closed, lazy.current], [1, undefined]);
});

test("LazyConnection.connect() leaves a later socket alone when an earlier one is disposed of again", async () => {
  const { lazy, sockets } = ofSockets();
  const disposals: Disposable[] = [];
  const first = await lazy.connect();
  first[Symbol.dispose]();
  using second = await lazy.connect();
  const run = lazy.run(async () => disposals.push(await lazy.get()));
  await run;
  for (const conn of [first, ...disposals]) conn[Symbol.dispose]();
  assertStrictEquals(lazy.current, second);
  assertEquals(sockets[1]!.closed, 0);
  await lazy[Symbol.asyncDispose]();
  for (const conn of [first, ...disposals]) conn[Symbol.dispose]();
});

test("LazyConnection.connect() rejects if the task has a socket or is opening one", async () => {
  const { lazy, sockets } = ofSockets();
  const message = "Cannot connect: the task has a socket or is opening one, " +
    "dispose of it or start another task with run()";
  const task = async (open: () => Promise<Deno.TcpConn>) => {
    const opening = open();
    await assertRejects(() => lazy.connect(), AlreadyExists, message);
    const get = lazy.get();
    using conn = await opening;
    await assertRejects(() => lazy.connect(), AlreadyExists, message);
    assertStrictEquals(await get, conn);
    assertStrictEquals(lazy.current, conn);
  };
  await task(() => lazy.connect());
  await lazy.run(task, () => lazy.connect());
  await lazy.run(task, () => lazy.get());
  assertEquals(sockets.length, 3);
});

test("LazyConnection.connect() is refused with an opener, before anything is opened", async () => {
  const { lazy, calls } = driven<Deno.TcpConn>();
  const message = "Cannot connect: a block cannot tell the opener whether it " +
    "succeeded, call get()";
  await assertRejects(() => lazy.connect(), TypeError, message);
  await assertRejects(() => lazy.run(() => lazy.connect()), TypeError);
  assertEquals(calls.length, 0);
  const others = [
    // @ts-expect-error only a TcpConn can be what options give
    () => driven<AsyncDisposable>().lazy.connect(),
    // @ts-expect-error only a TcpConn can be what options give
    () => driven<Deno.TlsConn>().lazy.connect(),
  ];
  for (const other of others) await assertRejects(other, TypeError);
});

netTest(
  "LazyConnection opens a TcpConn for each task, and closes it",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    await using lazy = new LazyConnection({ port: listener.addr.port });
    const ways: Record<string, () => Promise<Deno.TcpConn>> = {
      "using": async () => {
        using conn = await lazy.connect();
        return conn;
      },
      "await using": async () => {
        await using conn = await lazy.connect();
        return conn;
      },
      "closed by hand": async () => {
        using conn = await lazy.connect();
        conn.close();
        await assertRejects(() => lazy.connect(), AlreadyExists);
        return conn;
      },
      "the end of the task": () => lazy.run(() => lazy.get()),
    };
    const ports = new Set<number>();
    for (const way of Object.values(ways)) {
      const conn = await way();
      await assertRejects(() => conn.write(new Uint8Array(1)), BadResource);
      ports.add(conn.localAddr.port);
      using server = await listener.accept();
      assertEquals(await server.read(new Uint8Array(1)), null);
    }
    assertEquals(ports.size, 4);
  },
);

netTest(
  "LazyConnection holds a thousand tasks' connections at once",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const lazy = new LazyConnection({ port: listener.addr.port });
    const all = Promise.withResolvers<void>();
    const echo = async (id: number) => {
      const conn = await lazy.get();
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
    all.resolve();
    assertEquals(await Promise.all(echoes), ids.map((id) => `task ${id}`));
    await Promise.all(served);
  },
);

// The opener

test("lend() rejects the second time, with why the task failed", async () => {
  const error = new Error("40001");
  const message =
    "Cannot lend: the opener has lent already, retry around run()";
  const again: TypeError[] = [];
  const lazy = new LazyConnection<Fake>(async (lend) => {
    const fake = new Fake();
    const first = lend(fake);
    for (const _ of [first, first]) {
      const second = lend(fake); // while lent, and then after it
      again.push(await assertRejects(() => second, TypeError, message));
      await first.catch(() => {});
    }
    throw again.at(-1);
  });
  const run = lazy.run(async () => {
    await lazy.get();
    await settled();
    throw error;
  });
  assertStrictEquals(await reasonOf(run), again[1]);
  assertEquals("cause" in again[0]!, false);
  assertStrictEquals(again[1]!.cause, error);
});

test("lend() refuses another task's connection, and the opener may lend another", async () => {
  const [shared, spare] = [new Fake(), new Fake()];
  let refused: unknown;
  const lazy = new LazyConnection<Fake>((lend) =>
    lend(shared).catch((error) => {
      if (!(error instanceof Busy)) throw error;
      refused = error;
      return lend(spare);
    })
  );
  const query = async () => (await lazy.get()).query("");
  await lazy.run(async () => {
    await query();
    await lazy.run(query);
    assertEquals([shared.sent.length, spare.sent.length], [1, 1]);
    const message = "Cannot lend: another task has this connection";
    assertStringIncludes(String(refused), message);
  });
  await lazy.run(query); // it is free again
  assertEquals([shared.sent.length, spare.sent.length], [2, 1]);

  const unmoved = new LazyConnection<Fake>((lend) => lend(shared));
  await unmoved.run(async () => {
    await unmoved.get();
    await assertRejects(() => unmoved.run(() => unmoved.get()), Busy);
  });
});

test("lend() refuses what is no object, or a promise, and the opener may lend another", async () => {
  const values = [undefined, null, 1, "a", Symbol("a"), Promise.resolve({})];
  for (const value of values) {
    const lazy = new LazyConnection<Fake>(async (lend) => {
      const message = "Cannot lend: the connection must be an object, " +
        "and no promise";
      const refused = lend(value as unknown as Fake); // the types forbid it
      await assertRejects(() => refused, TypeError, message);
      await lend(new Fake());
    });
    await lazy.run(async () => assertInstanceOf(await lazy.get(), Fake));
  }
});

test("lend() may be handed on", async () => {
  const outcomes: string[] = [];
  const transaction = async <T>(fn: (fake: Fake) => Promise<T>): Promise<T> => {
    const result = await fn(new Fake());
    outcomes.push("committed");
    return result;
  };
  const lazy = new LazyConnection<Fake>((lend) => transaction(lend));
  await lazy.run(() => lazy.get());
  assertEquals(outcomes, ["committed"]);
});

test("lend() lets a pool hand a connection on from within closing", async () => {
  const pooled = new Fake();
  const free = [pooled];
  const waiting: ((fake: Fake) => void)[] = [];
  const lazy = new LazyConnection<Fake>(async (lend) => {
    const fake = free.pop() ??
      await new Promise<Fake>((resolve) => waiting.push(resolve));
    try {
      await lend(fake);
    } finally {
      const next = waiting.shift();
      if (next) next(fake);
      else free.push(fake);
      await settled();
    }
  });
  const task = () => lazy.run(() => lazy.get());
  await Promise.all([task(), task(), task()]);
  assertEquals(free, [pooled]);
});

test("LazyConnection calls the opener as a function of its own", async () => {
  const lazy = new LazyConnection<Fake>(function (this: unknown, lend) {
    assertEquals(this, undefined);
    return opener(lend);
  });
  await lazy.run(() => lazy.get());
});

test("LazyConnection lets an opener start a task of its own", async () => {
  let depth = 0;
  const lazy: LazyConnection<Fake> = new LazyConnection<Fake>(async (lend) => {
    if (++depth < 3) await lazy.run(() => lazy.get());
    await opener(lend);
  });
  await lazy.run(() => lazy.get());
  assertEquals(depth, 3);
});

test("LazyConnection fails the task with one error if its opener is over first", async (t) => {
  const error = new Error("server gone");
  const task = new Error("task");
  const wrapper = new Error("wrapper", { cause: error });
  const cases: Record<string, [opener: unknown, own: unknown, got: unknown]> = {
    "by rejecting": [error, undefined, error],
    "by resolving": [undefined, undefined, TypeError],
    "and the task with its error": [error, error, error],
    "and the task with what has its error": [error, wrapper, wrapper],
    "and the task with another error": [error, task, SuppressedError],
  };
  for (const [name, [over, own, got]] of Object.entries(cases)) {
    await t.step(name, async () => {
      const { lazy, calls } = driven();
      let leftover!: { fake: Fake; get: () => Promise<Fake> };
      const run = lazy.run(async () => {
        const get = lazy.get();
        const lent = calls[0]!.lend(new Fake());
        const fake = await get;
        if (over) calls[0]!.reject(over);
        else calls[0]!.resolve();
        await settled();
        const reason = await reasonOf(lazy.get());
        if (over) assertStrictEquals(reason, over);
        else assertOver(reason);
        assertStrictEquals(await reasonOf(lent), reason);
        assertStrictEquals(thrownBy(() => fake.query("")), reason);
        assertEquals([lazy.current, calls.length], [undefined, 1]);
        const inTask = AsyncLocalStorage.snapshot();
        leftover = { fake, get: () => inTask(() => lazy.get()) };
        if (own) throw own;
      });
      const reason = await reasonOf(run);
      if (got === SuppressedError) assertBoth(reason, own, over);
      else if (typeof got === "object") assertStrictEquals(reason, got);
      else assertOver(reason);
      assertThrows(() => leftover.fake.query(""), BadResource, ENDED);
      await assertRejects(leftover.get, BadResource, ENDED);
    });
  }
});

/** Asserts that an error says that the opener was over too early. */
function assertOver(reason: unknown, message = OVER) {
  assertInstanceOf(reason, TypeError);
  assertStringIncludes(String(reason), message);
}

/** What a function throws. */
function thrownBy(fn: () => unknown): unknown {
  try {
    fn();
  } catch (error) {
    return error;
  }
  throw new Error("The function did not throw");
}

test("lend() rejects with why the attempt failed once the opener is over", async () => {
  const { lazy, calls } = driven();
  await lazy.run(async () => {
    const get = lazy.get();
    calls[0]!.resolve();
    const reason = await reasonOf(get);
    assertStrictEquals(await reasonOf(calls[0]!.lend(new Fake())), reason);
    assertEquals(lazy.current, undefined);
  });
});

// The stand-in

/** Calls a function in a task that has a connection. */
async function lent<C extends object>(
  connection: C,
  fn: (standIn: C) => unknown,
): Promise<void> {
  const lazy = new LazyConnection<C>((lend) => lend(connection));
  await lazy.run(async () => await fn(await lazy.get()));
}

/** A connection of all that one can have. */
class Client extends Fake {
  #self = this;
  static instances = 0;
  level = 1;
  quote = (text: string) => `'${text}'`;
  get self(): this {
    return this.#self;
  }
  set length(length: number) {
    while (this.#self.sent.length < length) this.query("");
  }
  get nextLevel(): number {
    return ++this.level;
  }
  get quoter(): () => string {
    return () => "new each time";
  }
  on(): Client {
    return this;
  }
  *[Symbol.iterator]() {
    yield* this.sent;
  }
}

test("the stand-in works as the connection, which has private fields", async () => {
  const client = new Client();
  await lent(client, (standIn) => {
    assertNotStrictEquals(standIn, client);
    assertEquals(standIn.query("a"), 1);
    assertEquals(standIn.sent, ["a"]);
    standIn.length = 2;
    standIn.level++;
    assertEquals([client.sent.length, client.level], [2, 2]);
    assertEquals([...standIn], ["a", ""]);
    assertEquals(standIn.quote("b"), "'b'");
    assertStrictEquals(standIn.query, standIn.query);
    assertEquals(standIn.query.call(new Client(), "to another"), 1);
    const { quote } = standIn;
    assertEquals(quote("c"), "'c'");

    assertInstanceOf(standIn, Client);
    assertStrictEquals(standIn.constructor, Client);
    assert("query" in standIn && !("commit" in standIn));
    assertEquals(Object.keys(standIn), Object.keys(client));
    delete (standIn as Partial<Client>).level;
    assertEquals(client.level, undefined);
  });
});

test("the stand-in is what methods and accessors return that return the connection", async () => {
  const client = Object.assign(new Client(), { owner: {} });
  client.owner = client;
  await lent(client, (standIn) => {
    for (const got of [standIn.on(), standIn.self, standIn.owner]) {
      assertStrictEquals(got, standIn);
    }
  });
  const fn = Object.assign(() => fn, { sql: () => fn });
  await lent(fn, (standIn) => assertStrictEquals(standIn(), standIn));
  await lent(fn, (standIn) => assertStrictEquals(standIn.sql(), standIn));
});

test("the stand-in works for a function, with functions of its own", async () => {
  const sql = Object.assign(
    (text: TemplateStringsArray, ...values: number[]) =>
      text.raw.join("$") + values,
    { typed: Object.assign(() => "typed", { date: () => "date" }) },
  );
  const lazy = new LazyConnection<typeof sql>((lend) => lend(sql));
  const leftover = await lazy.run(async () => {
    const tag = await lazy.get();
    assertEquals(tag`SELECT ${1}`, "SELECT $1");
    assertEquals([tag.typed(), tag.typed.date()], ["typed", "date"]);
    return { tag };
  });
  assertThrows(() => leftover.tag`SELECT ${2}`, BadResource);
});

test("the stand-in gives to what inherits from it what the connection would", async () => {
  const client = {
    level: 1,
    get double() {
      return this.level * 2;
    },
    set half(level: number) {
      this.level = level / 2;
    },
  };
  await lent(client, (standIn) => {
    const heir: typeof client = Object.create(standIn);
    heir.level = 5;
    assertEquals([heir.double, standIn.double], [10, 2]);
    heir.half = 6;
    assertEquals([heir.level, client.level], [3, 1]);
  });
});

test("the stand-in refuses all use once the task has ended, however it ended", async () => {
  const message = `Cannot use the connection: ${ENDED}`;
  for (const error of [undefined, new Error("task")]) {
    const client = new Client();
    let leftover: { standIn: Client; query: Client["query"] };
    const run = lent(client, (standIn) => {
      leftover = { standIn, query: standIn.query };
      if (error) throw error;
    });
    assertStrictEquals(await run.catch((error) => error), error);
    const { standIn, query } = leftover!;
    const uses: (() => unknown)[] = [
      () => standIn.query("late"),
      () => query.call(standIn, "late"),
      () => query("late"),
      () => standIn.nextLevel,
      () => standIn.sent,
      () => standIn.length = 2,
      () => standIn.level = 2,
      () => Object.defineProperty(standIn, "level", { value: 2 }),
      () => [...standIn],
    ];
    for (const use of uses) assertThrows(use, BadResource, message);
    assertEquals([client.sent.length, client.level], [0, 1]);
    client.query("the opener's own"); // goes on

    assertInstanceOf(standIn, Client);
    assert("query" in standIn);
    assertMatch(Deno.inspect(standIn), /Client/);
    assertMatch(Object.prototype.toString.call(standIn), /Object/);
    assertStrictEquals(await Promise.resolve(standIn), standIn);
  }
});

test("LazyConnection.run() resolves to a stand-in, if the function does", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const standIn = await lazy.run(() => lazy.get());
  assertThrows(() => standIn.query("late"), BadResource);
});

test("the stand-in refuses to be disposed of, at the head of the block", async () => {
  let disposals = 0;
  const client = {
    queries: 0,
    [Symbol.dispose]: () => void disposals++,
    [Symbol.asyncDispose]: () => Promise.resolve(void disposals++),
  };
  const message = "Cannot dispose of the connection: its opener closes it " +
    "when the task ends, use an inner run() to end earlier";
  let standIn!: AsyncDisposable & Disposable;
  const blocks = [
    async () => {
      using _conn = await Promise.resolve(standIn);
      client.queries++;
    },
    async () => {
      await using _conn = standIn;
      client.queries++;
    },
  ];
  const refuse = async () => {
    for (const block of blocks) await assertRejects(block, TypeError, message);
  };
  await lent<AsyncDisposable & Disposable>(client, (lent) => {
    standIn = lent;
    return refuse();
  });
  await refuse(); // also once the task has ended
  assertEquals([disposals, client.queries], [0, 0]);
});

test("the stand-in leaves no trace of a method that is patched and put back", async () => {
  const client = new Client();
  const { query, on } = client;
  await lent(client, (standIn) => {
    const { query } = standIn;
    standIn.query = (sql) => query.call(standIn, `/* traced */ ${sql}`);
    standIn.query("a");
    standIn.query = Client.prototype.query; // as by its descriptor
    standIn.query("b");
    standIn.query = query;
    Object.assign(standIn, { owner: standIn });
  });
  assertStrictEquals(client.query, query);
  assertStrictEquals((client as Client & { owner: object }).owner, client);
  assertStrictEquals(client.on, on);
  await lent(client, (standIn) => standIn.query("c"));
  assertEquals(client.sent, ["/* traced */ a", "b", "c"]);
});

test("the stand-in gives a function as it was assigned, as mocks expect", async () => {
  const client = new Client();
  await lent(client, (standIn) => {
    standIn.query = Client.prototype.query; // which is the connection's own
    assertEquals(standIn.query("a"), 1);
    const seen: unknown[] = [];
    const mock = function (this: unknown) {
      return seen.push(this);
    };
    standIn.query = mock;
    assertStrictEquals(standIn.query, mock);
    assertEquals([standIn.query(""), client.query("")], [1, 2]);
    assertStrictEquals(seen[0], standIn);
    assertStrictEquals(seen[1], client);
    const { on } = standIn;
    for (const value of [mock, on]) {
      Object.defineProperty(standIn, "on", { value, configurable: true });
      assertStrictEquals(standIn.on as unknown, value);
    }
    Object.defineProperty(standIn, "level", { get: () => 3 });
    assertEquals(client.level, 3);

    const quote = Object.getOwnPropertyDescriptor(standIn, "quote")!;
    standIn.quote = () => "mocked";
    assertEquals(standIn.quote("a"), "mocked");
    Object.defineProperty(standIn, "quote", quote); // it was never read before
    assertNotStrictEquals(standIn.quote, client.quote);
  });
  assertStrictEquals(client.on, Client.prototype.on);
});

test("the stand-in reads nothing of a property that is assigned", async () => {
  const handlers: unknown[] = [];
  const client = {
    get onmessage(): () => void {
      throw new Error("read");
    },
    set onmessage(handler) {
      handlers.push(handler);
    },
  };
  const handler = () => {};
  await lent(client, (standIn) => standIn.onmessage = handler);
  assertStrictEquals(handlers[0], handler);
});

test("the stand-in does not refuse a connection that calls its own patched method", async () => {
  const client = new Client();
  await lent(client, (standIn) => {
    const { on, query } = standIn;
    standIn.on = function () {
      return on.call(this);
    };
    standIn.query = function (sql) {
      return query.call(this, sql);
    };
  });
  assertEquals(client.query("after the task"), 1);
  assertStrictEquals(client.on(), client);
});

test("the stand-in gives what is frozen as it is", async () => {
  const client = Object.assign(() => {}, { query() {} });
  const frozen: Readonly<{ client: object; self?: object }> = { client };
  Object.assign(frozen, { self: frozen });
  Object.freeze(frozen);
  await lent(frozen, (standIn) => {
    assertStrictEquals(standIn.client, client);
    assertStrictEquals(standIn.self, frozen);
  });
  const readOnly = Object.defineProperty({ client }, "client", {
    writable: false,
  });
  for (const other of [{ client }, Object.seal({ client }), readOnly]) {
    await lent(other, (standIn) => {
      assertNotStrictEquals(standIn.client, client);
    });
  }
});

test("the stand-in keeps no function that an accessor makes anew", async () => {
  await lent(new Client(), async (standIn) => {
    assert(await isCollected(() => standIn.quoter));
    standIn.query("");
  });
});

test("the stand-in may be lent again, to one task at a time", async () => {
  const outers = new AsyncLocalStorage<Fake>();
  const fake = new Fake();
  const lazy = new LazyConnection<Fake>(async (lend) => {
    await lend(outers.getStore() ?? fake);
    fake.query("end");
  });
  await lazy.run(async () => {
    const outer = await lazy.get();
    const insert = async () => {
      const client = await lazy.get();
      client.query("INSERT");
      return { client };
    };
    const savepoint = () => outers.run(outer, () => lazy.run(insert));
    const { client } = await savepoint();
    assertThrows(() => client.query("late"), BadResource);
    outer.query("outer");
    assertEquals(fake.sent, ["INSERT", "end", "outer"]);
    const [a, b] = await Promise.allSettled([savepoint(), savepoint()]);
    assertEquals(a!.status, "fulfilled");
    assertInstanceOf((b as PromiseRejectedResult).reason, Busy);
  });
});

// Cancelling

test("LazyConnection.connect() rejects at once when its signal aborts, whatever is opened later", async () => {
  for (const reason of [new Error("enough"), "enough", null, 0]) {
    const opening: ((socket: Socket) => void)[] = [];
    const signals: AbortSignal[] = [];
    stubConnect(({ signal }) => {
      signals.push(signal!);
      return new Promise((resolve) => opening.push(resolve));
    });
    const lazy = new LazyConnection({ port: 1 });
    const controller = new AbortController();
    const attempts = [lazy.connect(controller)];
    await lazy.run(async () => {
      attempts.push(lazy.connect(controller), lazy.get());
      controller.abort(reason);
      for (const attempt of attempts) {
        assertStrictEquals(await reasonOf(attempt), reason);
      }
      for (const { reason } of signals) assertStrictEquals(reason, reason);

      const connect = lazy.connect(); // the task is free
      const sockets = opening.map(() => new Socket());
      for (const resolve of opening) {
        resolve(sockets[opening.indexOf(resolve)]!);
      }
      using conn = await connect;
      await settled();
      assertEquals(sockets.map(({ closed }) => closed), [1, 1, 0]);
      assertStrictEquals(lazy.current, conn);
    });
  }
});

test("LazyConnection.connect() does not start with an aborted or invalid signal", async () => {
  const { lazy, sockets } = ofSockets();
  const reason = { own: "reason" };
  const signal = AbortSignal.abort(reason);
  assertStrictEquals(await reasonOf(lazy.connect({ signal })), reason);
  for (const invalid of [{ aborted: false }, null, 0]) { // a polyfill's, say
    const signal = invalid as AbortSignal;
    await assertRejects(() => lazy.connect({ signal }), TypeError);
  }
  assertEquals(sockets.length, 0);
  using _conn = await lazy.connect({ signal: undefined });
});

test("LazyConnection.connect() rejects in time with AbortSignal.timeout()", async () => {
  stubConnect(() => new Promise(() => {})); // never answers
  const lazy = new LazyConnection({ port: 1 });
  const connect = lazy.connect({ signal: AbortSignal.timeout(5) });
  const error = await assertRejects(() => connect, DOMException);
  assertEquals(error.name, "TimeoutError");
});

test("LazyConnection heeds the signal of the options besides its own", async () => {
  stubConnect(() => new Promise(() => {})); // never answers
  for (const which of [0, 1]) {
    const controllers = [new AbortController(), new AbortController()];
    const [own, options] = controllers;
    const lazy = new LazyConnection({ port: 1, signal: options!.signal });
    await lazy.run(async () => {
      const attempts = [lazy.connect(own), lazy.get()];
      controllers[which]!.abort("enough");
      for (const attempt of attempts) {
        assertEquals(await reasonOf(attempt), "enough");
      }
      if (which === 1) assertEquals(await reasonOf(lazy.get()), "enough");
    });
  }
});

netTest(
  "LazyConnection closes a socket that opened as its signal aborted",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr;
    const { connect } = Deno;
    for (const own of [true, false]) {
      const controller = new AbortController();
      let conn: Deno.TcpConn | undefined;
      // As Deno.connect() does, where the abort comes between its last two steps
      stubConnect(async ({ signal, ...options }) => {
        try {
          return conn = await connect(options);
        } finally {
          controller.abort("enough");
          signal!.throwIfAborted();
        }
      });
      const { signal } = controller;
      const lazy = new LazyConnection({ port, ...(own ? {} : { signal }) });
      const attempt = lazy.connect(own ? { signal } : {});
      assertEquals(await reasonOf(attempt), "enough");
      await lazy[Symbol.asyncDispose]();
      await assertRejects(() => conn!.write(new Uint8Array(1)), BadResource);
    }
  },
);

netTest(
  "LazyConnection.connect() is cancelled at once over a socket",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const lazy = new LazyConnection({ port: listener.addr.port });
    const controller = new AbortController();
    const connect = lazy.connect(controller);
    controller.abort("enough");
    assertEquals(await reasonOf(connect), "enough");
    await lazy[Symbol.asyncDispose]();
  },
);

test("LazyConnection never aborts the opener's signal once it has lent, or is over", async () => {
  const { lazy, calls } = driven();
  await lazy.run(async () => {
    const failed = lazy.get();
    calls[0]!.reject(new Error("opener"));
    await assertRejects(() => failed, Error, "opener");
    lazy.get();
    calls[1]!.lend(new Fake()).then(calls[1]!.resolve);
  });
  await lazy[Symbol.asyncDispose]();
  for (const { signal } of calls) assert(!signal.aborted);

  const { lazy: sockets } = ofSockets();
  const controller = new AbortController();
  using conn = await sockets.connect(controller);
  controller.abort();
  assertStrictEquals(sockets.current, conn);
});

test("LazyConnection has nobody hear of an opener that was cancelled and goes on", async () => {
  const { lazy, calls } = driven();
  const cancelled = lazy.run(() => void lazy.get());
  await cancelled;
  const run = lazy.run(async () => {
    lazy.get();
    calls[1]!.lend(new Fake()).then(calls[1]!.resolve);
    const got = await lazy.get();
    assertStrictEquals(lazy.current, got);
  });
  await run;
  const disposal = lazy[Symbol.asyncDispose]();
  assert(await isPending(disposal));
  calls[0]!.reject(new Error("late"));
  await disposal;
});

test("LazyConnection leaves nothing at a signal that attempts share", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  stubConnect(() => Promise.resolve(new Socket()));
  const lazy = new LazyConnection({ port: 1, signal });
  const attempt = async () => {
    using conn = await lazy.connect({ signal });
    return conn;
  };
  assert(await isCollected(attempt));
  controller.abort();
});

// [Symbol.asyncDispose]()

test("LazyConnection[Symbol.asyncDispose]() takes every connection, with one error for all", async () => {
  const { lazy, calls } = driven();
  const run = lazy.run(async () => {
    const get = lazy.get();
    const lent = calls[0]!.lend(new Fake());
    const fake = await get;
    const disposal = lazy[Symbol.asyncDispose]();
    const error = await assertRejects(() => lazy.get(), BadResource, DISPOSED);
    assertStrictEquals(await reasonOf(lent), error);
    assertStrictEquals(thrownBy(() => fake.query("")), error);
    assertStrictEquals(thrownBy(() => fake.outcome = ""), error);
    assertEquals(lazy.current, undefined);
    assert(await isPending(disposal));
    assertEquals(await lazy.runOrJoin(() => 1), 1);
  });
  await delay(1); // what closing fails with, the task hears at its end
  calls[0]!.reject(new Error("ROLLBACK failed"));
  const both = await assertRejects(() => run, SuppressedError);
  assertInstanceOf(both.suppressed, BadResource);
  await lazy[Symbol.asyncDispose]();
});

test("LazyConnection[Symbol.asyncDispose]() fails a task that had a connection, and no other", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const end = Promise.withResolvers<void>();
  const task = async () => {
    await lazy.get();
    await end.promise;
  };
  const runs = [lazy.run(task), lazy.run(task)];
  const idle = lazy.run(() => end.promise);
  await settled();
  await lazy[Symbol.asyncDispose](); // the openers reject with its error
  end.resolve();
  await idle;
  const [a, b] = await Promise.all(runs.map(reasonOf));
  assertInstanceOf(a, BadResource);
  assertStrictEquals(a, b);

  const { lazy: sockets } = ofSockets();
  const left = sockets.run(async () => {
    {
      using _conn = await sockets.connect();
    }
    await sockets[Symbol.asyncDispose]();
  });
  await left; // it had none any more
});

test("LazyConnection[Symbol.asyncDispose]() leaves the task its own error", async () => {
  for (const when of ["before", "after"]) {
    const lazy = new LazyConnection<Fake>(opener);
    const error = new Error("task");
    const run = lazy.run(async () => {
      await lazy.get();
      if (when === "before") {
        await lazy.runOrJoin(throws(error)).catch(() => {});
      }
      await lazy[Symbol.asyncDispose]();
      if (when === "after") throw error;
    });
    assertStrictEquals(await reasonOf(run), error);
  }
});

test("LazyConnection[Symbol.asyncDispose]() cancels every attempt, and waits for all openers", async () => {
  const { lazy, calls } = driven();
  const attempts = [1, 2].map(() => reasonOf(lazy.run(() => lazy.get())));
  const floating = lazy.run(() => {
    lazy.get(); // nobody awaits it, and the process goes on
    return settled();
  });
  const disposal = lazy[Symbol.asyncDispose]();
  const again = lazy[Symbol.asyncDispose]();
  const [a, b] = await Promise.all(attempts);
  assertInstanceOf(a, BadResource);
  assertStrictEquals(a, b);
  await floating;
  for (const { lend, signal, resolve } of calls) {
    assertStrictEquals(signal.reason, a);
    assertStrictEquals(await reasonOf(lend(new Fake())), a);
    assert(await isPending(disposal));
    assert(await isPending(again));
    resolve();
  }
  await Promise.all([disposal, again]);
});

test("LazyConnection[Symbol.asyncDispose]() refuses whatever comes later", async () => {
  const { lazy, sockets } = ofSockets();
  await lazy[Symbol.asyncDispose]();
  const reason = await reasonOf(lazy.get());
  await lazy[Symbol.asyncDispose]();
  assertStrictEquals(await reasonOf(lazy.get()), reason);
  const refused = [
    () => lazy.connect(),
    () => lazy.get(),
    () => lazy.run(() => assert(false)),
    () => lazy.runOrJoin(() => assert(false)),
  ];
  for (const fn of refused) await assertRejects(fn, BadResource, DISPOSED);
  lazy.connect(); // nobody awaits it, and the process goes on
  assertEquals(sockets.length, 0);
});

test("LazyConnection[Symbol.asyncDispose]() closes the socket of a block, also outside of run()", async () => {
  const { lazy, sockets } = ofSockets();
  using _outside = await lazy.connect();
  const run = lazy.run(async () => {
    using _conn = await lazy.connect();
    await lazy[Symbol.asyncDispose]();
    assertEquals(sockets.map(({ closed }) => closed), [1, 1]);
    await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  });
  await assertRejects(() => run, BadResource, DISPOSED);
  await assertRejects(() => lazy.get(), BadResource, DISPOSED);
});

test("LazyConnection[Symbol.asyncDispose]() lets a task that has ended commit", async () => {
  const { lazy, calls } = driven();
  const run = lazy.run(async () => {
    const get = lazy.get();
    calls[0]!.lend(new Fake());
    await get;
  });
  await settled();
  const disposal = lazy[Symbol.asyncDispose]();
  assert(await isPending(disposal));
  const error = new Error("COMMIT refused");
  calls[0]!.reject(error);
  assertStrictEquals(await reasonOf(run), error); // who alone is told
  await disposal;
});

test("LazyConnection[Symbol.asyncDispose]() waits for the opener that calls it", async () => {
  let disposal: Promise<void> | undefined;
  let closed = false;
  const lazy: LazyConnection<Fake> = new LazyConnection<Fake>(async (lend) => {
    disposal = lazy[Symbol.asyncDispose]();
    await assertRejects(() => lend(new Fake()), BadResource, DISPOSED);
    await delay(1);
    closed = true;
  });
  await assertRejects(() => lazy.run(() => lazy.get()), BadResource, DISPOSED);
  await disposal;
  assert(closed);
});

// The demo

netTest(
  "demo shows two connections at once, and what else a LazyConnection does",
  async () => {
    const lines: string[] = [];
    await main([], (line) => lines.push(line));
    const addresses = lines.splice(0, 2).map((line) =>
      line.match(/^task [12]: connected from (127\.0\.0\.1:\d+)$/)![1]
    );
    assertEquals(new Set(addresses).size, 2);
    const got = lines.splice(1, 2).sort();
    assertMatch(got[0]!, /^task 1: Got \d+ bytes$/);
    assertEquals(got[1], got[0]!.replace("task 1", "task 2"));
    assertEquals(lines, [
      "both connections are open",
      "a second connect() in a task: AlreadyExists",
      "a connect() that its signal cancels: AbortError",
      "a task that succeeds: BEGIN, INSERT, COMMIT",
      "a task that fails: BEGIN, INSERT, ROLLBACK",
    ]);
    const usage = "Cannot run the demo: give HOST and PORT, or nothing";
    await assertRejects(() => main(["127.0.0.1"], () => {}), TypeError, usage);
  },
);
