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
const DISPOSED = "the LazyConnection has been disposed of";
const ENDED = "the task's function has settled before this; await all that " +
  "it starts, or start another task with runNew()";

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

/** A client with a private field, which a proxy does not have. */
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

/** Lends a `Fake`, which learns the outcome of its task, and passes that on. */
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

/** A `LazyConnection` with that opener, and what it has lent. */
function ofFakes() {
  const fakes: Fake[] = [];
  const open: Opener<Fake> = (lend) =>
    opener((fake) => lend(fakes[fakes.push(fake) - 1]!));
  return { lazy: new LazyConnection<Fake>(open), fakes };
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
  open = true;
  close() {
    if (!this.open) throw new BadResource("Bad resource ID");
    this.open = false;
  }
  [Symbol.dispose]() {
    this.open = false;
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
async function flush(): Promise<void> {
  for (let i = 0; i < 50; i++) await null;
}

/** Whether a promise is pending once all others have settled that can. */
async function isPending(promise: PromiseLike<unknown>): Promise<boolean> {
  let pending = true;
  const settle = () => pending = false;
  promise.then(settle, settle);
  await flush();
  return pending;
}

/** What a promise rejects with, which need not be an `Error`. */
async function reasonOf(promise: PromiseLike<unknown>): Promise<unknown> {
  const [result] = await Promise.allSettled([promise]);
  if (result.status === "rejected") return result.reason;
  throw new Error("The promise did not reject");
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

/** A function that throws. */
function throws(error: unknown): () => never {
  return () => {
    throw error;
  };
}

/** A function with a name, which need not be a string. */
function named<F extends () => unknown>(name: unknown, fn: F): F {
  return Object.defineProperty(fn, "name", { value: name });
}

/** Calls functions as in a task that has ended. */
async function endedTask(lazy: LazyConnection<object>) {
  return await lazy.runNew(() => AsyncLocalStorage.snapshot());
}

// new LazyConnection()

test("LazyConnection constructor opens nothing", async () => {
  const { lazy, calls } = driven();
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
  assertInstanceOf(wider, LazyConnection);
  assertEquals(openers.length, 2);
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

// run()

for (const name of ["run", "runNew"] as const) {
  test(`LazyConnection.${name}() resolves to the result of the function`, async () => {
    const lazy = new LazyConnection<Fake>(opener);
    const sync: number = await lazy[name](
      (a: number, b: number) => a + b,
      1,
      2,
    );
    const async: string = await lazy[name](
      (a: string) => Promise.resolve(a),
      "a",
    );
    const either: number | string = await lazy[name](() =>
      sync > 9 ? 1 : Promise.resolve("b")
    );
    assertEquals([sync, async, either], [3, "a", "b"]);
  });
}

test("LazyConnection.run() is a part of the task, or a task where there is none", async () => {
  const { lazy, fakes } = ofFakes();
  const insert = (...args: number[]) =>
    lazy.run(async (...args) => {
      const fake = await lazy.get();
      return fake.query(args.join());
    }, ...args);
  assertEquals(await insert(1, 2), 1);
  assertEquals(await insert(3), 1);
  const transfer = () => lazy.run(() => Promise.all([insert(4), insert(5)]));
  assertEquals(await transfer(), [1, 2]);
  await lazy.runNew(async () => {
    await transfer();
    await insert(6);
    assertEquals(fakes.at(-1)!.outcome, "open"); // a part commits nothing
  });
  assertEquals(fakes.map(({ sent }) => sent), [
    ...[["1,2"], ["3"], ["4", "5"]],
    ["4", "5", "6"],
  ]);
  for (const { outcome } of fakes) assertEquals(outcome, "committed");
});

test("LazyConnection.run() fails the whole task with an error that says so, if its own was caught", async () => {
  const message = "Cannot complete the task: a part of it failed, although " +
    "its error was caught; call what may fail alone outside of run(), or in " +
    "runNew()";
  for (const error of [new Error("part"), undefined]) {
    const { lazy, calls } = driven();
    let lent: Promise<void> | undefined;
    const run = lazy.runNew(async () => {
      lazy.get();
      lent = calls[0]!.lend(new Fake());
      assertStrictEquals(await reasonOf(lazy.run(throws(error))), error);
      assert(await isPending(lent));
    });
    const reason = await reasonOf(lent!);
    assertInstanceOf(reason, Error);
    assertEquals(String(reason), `Error: ${message}`);
    assertStrictEquals((reason as Error).cause, error);
    calls[0]!.resolve();
    assertStrictEquals(await reasonOf(run), reason);
  }
});

test("LazyConnection.run() leaves an error to be translated, by the task or by an outer part", async () => {
  const translated = new Error("translated");
  const lazy = new LazyConnection<Fake>(opener);
  const translate = async () => {
    await lazy.get();
    await lazy.run(throws(new Error("part"))).catch(() => {});
    throw translated;
  };
  assertStrictEquals(await reasonOf(lazy.runNew(translate)), translated);
  const outer = lazy.runNew(() => lazy.run(translate).catch(() => {}));
  const error = await assertRejects(() => outer, Error, "a part of it failed");
  assertStrictEquals(error.cause, translated);
});

test("LazyConnection.run() has the first part that failed say why, not what failed for it", async () => {
  const first = new Error("duplicate key");
  const lazy = new LazyConnection<Fake>(opener);
  const task = lazy.runNew(async () => {
    await lazy.run(throws(first)).catch(() => {});
    await lazy.run(throws(new Error("25P02"))).catch(() => {});
  });
  const { cause } = await assertRejects(() => task, Error);
  assertStrictEquals(cause, first);
});

test("LazyConnection.run() calls nothing in a task that has ended", async () => {
  const { lazy, calls } = driven();
  const inEnded = await endedTask(lazy);
  let called = 0;
  const message = `Cannot take part in the task: ${ENDED}`;
  const run = inEnded(() => lazy.run(() => called++));
  await assertRejects(() => run, BadResource, message);
  assertEquals([called, calls.length], [0, 0]);
});

test("LazyConnection.run() fails a task that ends before it has settled, and is named", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const names: [unknown, string][] = [
    ["debit", 'its part "debit"'],
    ["", "a part of it"],
    [Symbol("debit"), "a part of it"],
  ];
  for (const [value, name] of names) {
    const { promise, reject } = Promise.withResolvers<never>();
    let loser: Promise<never> | undefined;
    const run = lazy.runNew(async () => {
      await lazy.get();
      loser = lazy.run(named(value, () => promise));
      await Promise.race([loser, lazy.run(() => 1)]);
    });
    const message =
      `Cannot complete the task: ${name} is pending; await each run()`;
    const error = await assertRejects(() => run, TypeError);
    assertEquals(error.message, message);
    reject("late"); // which nobody but its caller hears
    assertEquals(await reasonOf(loser!), "late");
  }
});

test("LazyConnection.run() names a part that is pending among others that have settled", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const never = new Promise(() => {});
  for (const pending of [0, 1, 2]) {
    const parts = [0, 1, 2].map((i) =>
      named(`part ${i}`, () => i === pending ? never : delay(1))
    );
    const run = lazy.runNew(async () => {
      lazy.run(named("", () => never));
      for (const part of parts) lazy.run(part);
      await lazy.run(() => {});
      await delay(10);
    });
    const name = `its part "part ${pending}" is pending`;
    await assertRejects(() => run, TypeError, name);
  }
});

test("LazyConnection.run() leaves a task that ends before it the error of its own, or of another part", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const error = new Error("task");
  const never = () => new Promise(() => {});
  const own = lazy.runNew(() => {
    lazy.run(never);
    throw error;
  });
  assertStrictEquals(await reasonOf(own), error);
  const part = lazy.runNew(async () => {
    lazy.run(never);
    await lazy.run(throws(error)).catch(() => {});
  });
  const { cause } = await assertRejects(() => part, Error);
  assertStrictEquals(cause, error);
});

test("LazyConnection.run() takes 20,000 parts at once, in any order", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const start = performance.now();
  await lazy.runNew(async () => {
    const ends = Array.from({ length: 20_000 }, (_, i) => {
      const { promise, resolve } = Promise.withResolvers<void>();
      return { part: lazy.run(named(`${i}`, () => promise)), resolve };
    });
    for (let i = 0; i < ends.length; i++) ends[i * 7 % ends.length]!.resolve();
    await Promise.all(ends.map(({ part }) => part));
  });
  assert(performance.now() - start < 2_000); // milliseconds, of which it needs 30
});

// runNew(): what a task is

test("LazyConnection.runNew() gives each task a connection of its own", async () => {
  const { lazy, fakes } = ofFakes();
  const task = async () => {
    const fake = await lazy.get();
    await delay(1);
    assertStrictEquals(await lazy.get(), fake);
    fake.query("one");
    assertEquals(fake.sent, ["one"]);
    return { fake };
  };
  await lazy.runNew(async () => {
    const outer = await task();
    await Promise.all([lazy.runNew(task), lazy.runNew(task)]);
    await lazy.run(() => lazy.runNew(task));
    const outcomes = fakes.map(({ outcome }) => outcome);
    assertEquals(outcomes, ["open", "committed", "committed", "committed"]);
    assertStrictEquals(await lazy.get(), outer.fake);
  });
});

test("LazyConnection.runNew() inside a task leaves the outer one its failure, and keeps its own success", async () => {
  const { lazy, fakes } = ofFakes();
  const error = new Error("outer");
  const inner = new Error("inner");
  const get = () => lazy.get();
  await lazy.runNew(async () => {
    await lazy.get();
    const failing = lazy.runNew(() => get().then(throws(inner)));
    assertStrictEquals(await reasonOf(failing), inner);
  });
  const outer = lazy.runNew(async () => {
    await lazy.get();
    await lazy.runNew(get);
    throw error;
  });
  assertStrictEquals(await reasonOf(outer), error);
  const outcomes = fakes.map(({ outcome }) => outcome);
  assertEquals(outcomes, ["committed", inner, error, "committed"]);
});

test("LazyConnection.runNew() starts a task in one that has ended", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const inEnded = await endedTask(lazy);
  const sent = await inEnded(() =>
    lazy.runNew(async () => (await lazy.get()).query("INSERT"))
  );
  assertEquals(sent, 1);
});

netTest(
  "LazyConnection.runNew() starts a task where Deno leaks the context of another",
  async () => {
    const { lazy, fakes } = ofFakes();
    const insert = async () => (await lazy.get()).query("INSERT");
    const handled: unknown[] = [];
    await using server = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen() {} },
      async () => {
        handled.push(await lazy.runNew(insert));
        return new Response();
      },
    );
    // From then on, Deno 2.8.3 to 2.9.6 start handlers in the context of this task
    const leaking = lazy.runNew(async () => {
      await insert();
      await import(`data:text/javascript,export default ${Math.random()}`);
      for (let i = 0; i < 2; i++) {
        const response = await fetch(`http://127.0.0.1:${server.addr.port}`);
        await response.body?.cancel();
      }
      throw new Error("leaking");
    });
    await assertRejects(() => leaking, Error, "leaking");
    assertEquals(handled, [1, 1]);
    const outcomes = fakes.map(({ outcome }) => outcome);
    assertEquals(outcomes.slice(1), ["committed", "committed"]);
  },
);

test("LazyConnection.runNew() is one task with what it starts", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const target = new EventTarget();
  const get = () => lazy.get();
  await lazy.runNew(async () => {
    const fake = await get();
    const seen = [
      delay(1).then(get),
      new Promise((resolve) => setTimeout(() => resolve(get()), 1)),
      new Promise((resolve) => queueMicrotask(() => resolve(get()))),
      (async () => await get())(),
    ];
    for (const got of await Promise.all(seen)) assertStrictEquals(got, fake);
    target.addEventListener("a", () => seen.push(get()));
    // A listener runs in the task that dispatches to it
    await lazy.runNew(() => target.dispatchEvent(new Event("a")));
    assertNotStrictEquals(await seen.at(-1), fake);
  });
});

test("LazyConnection.runNew() and run() run a lazy thenable inside the task", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const query: PromiseLike<number> = {
    then: (...args) => lazy.get().then((fake) => fake.query("")).then(...args),
  };
  assertEquals(await lazy.runNew(() => query), 1);
  assertEquals(await lazy.runNew(() => lazy.run(() => query)), 1);
});

test("LazyConnection.runNew() and run() refuse a generator, whose body would run outside", async () => {
  const message = "Cannot return a generator: its body would run outside of " +
    "the task; iterate inside";
  const iterated: unknown[] = [];
  function* sync() {
    iterated.push(yield 1);
  }
  async function* async() {
    iterated.push(yield await Promise.resolve(1));
  }
  const generators = [sync, async, () => Promise.resolve(async())];
  // Older versions of V8 have no iterator helpers
  if ("map" in sync()) generators.push(() => sync().map((n) => n) as never);
  for (const generator of generators) {
    const { lazy, fakes } = ofFakes();
    const task = async () => {
      await lazy.get();
      return generator();
    };
    const error = await assertRejects(() => lazy.runNew(task), TypeError);
    assertEquals(error.message, message);
    assertStrictEquals(fakes[0]!.outcome, error);
    const caught = lazy.runNew(() => lazy.run(task).catch(() => {}));
    const { cause } = await assertRejects(() => caught, Error, "a part");
    assertInstanceOf(cause, TypeError);
  }
  assertEquals(iterated, []);
});

test("LazyConnection.runNew() and run() resolve to what is no generator", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const results = [
    ...[null, undefined, [1], new Map().entries(), function* () {}],
    ...[ReadableStream.from([]), new Response("a")],
  ];
  for (const result of results) {
    assertStrictEquals(await lazy.runNew(() => result), result);
    const part = lazy.runNew(() => lazy.run(() => result));
    assertStrictEquals(await part, result);
  }
});

// runNew(): how a task ends

test("LazyConnection.runNew() leaves nothing to what outlives it, however it ended", async () => {
  for (const error of [undefined, new Error("task")]) {
    const { lazy, sockets } = ofSockets();
    let inEnded!: ReturnType<typeof AsyncLocalStorage.snapshot>;
    const run = lazy.runNew(async () => {
      await lazy.get();
      inEnded = AsyncLocalStorage.snapshot();
      if (error) throw error;
    });
    assertStrictEquals(await run.catch((reason) => reason), error);
    assertEquals(sockets.splice(0).map(({ open }) => open), [false]);
    const get = inEnded(() => lazy.get());
    const message = `Cannot get a connection: ${ENDED}`;
    await assertRejects(() => get, BadResource, message);
    const connect = inEnded(() => lazy.connect());
    const another = `Cannot connect: ${ENDED}`;
    await assertRejects(() => connect, BadResource, another);
    await lazy[Symbol.asyncDispose](); // of which the task says no more
    const late = inEnded(() => lazy.get());
    await assertRejects(() => late, BadResource, message);
    assertEquals(sockets.length, 0);
  }
});

test("LazyConnection.runNew() waits for the opener to close, then resolves", async () => {
  const { lazy, calls } = driven();
  let lent: Promise<void> | undefined;
  const run = lazy.runNew(async () => {
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

test("LazyConnection.runNew() closes inside the task, which has ended", async () => {
  const stored: string[] = [];
  const lazy: LazyConnection<Fake> = new LazyConnection<Fake>(async (lend) => {
    const fake = new Fake();
    await lend(fake);
    stored.push(...fake.sent);
    if (stored.length === 2) return;
    await assertRejects(() => lazy.get(), BadResource, ENDED);
    await assertRejects(() => lazy.run(() => {}), BadResource, ENDED);
    await lazy.runNew(insert, "after COMMIT");
  });
  const insert = async (sql: string) => (await lazy.get()).query(sql);
  await lazy.runNew(insert, "task");
  assertEquals(stored, ["task", "after COMMIT"]);
});

test("LazyConnection.runNew() and lend() reject with the very error of the function", async () => {
  for (const error of [new Error("task"), "task", null, undefined]) {
    for (const fail of [() => Promise.reject(error), throws(error)]) {
      let lent: Promise<void> | undefined;
      const lazy = new LazyConnection<Fake>((lend) => lent = lend(new Fake()));
      const run = lazy.runNew(async () => {
        await lazy.get();
        await fail();
      });
      assertStrictEquals(await reasonOf(run), error);
      assertStrictEquals(await reasonOf(lent!), error);
      assertStrictEquals(await reasonOf(lazy.runNew(fail)), error);
    }
  }
});

test("LazyConnection.runNew() rejects with what closing fails with, alone or with the function's error", async (t) => {
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
      "the function's again, which is nothing": [
        undefined,
        undefined,
        undefined,
      ],
      "what has it as its cause": [task, has, has],
      "what has suppressed it": [task, suppressed, suppressed],
      "the cause of the function's": [wrapper, other, wrapper],
      "another one": [task, other, both],
      "what has another cause": [task, wrapper, both],
      "what has suppressed another": [other, suppressed, both],
      "no error": ["task", "other", both],
      "no error that has it": [other, { cause: other }, both],
      "nothing, and no error": [undefined, "other", both],
    };
  for (const [name, [own, closing, got]] of Object.entries(cases)) {
    await t.step(name, async () => {
      const lazy = new LazyConnection<Fake>(async (lend) => {
        await opener(lend).catch(() => {});
        throw closing;
      });
      const run = lazy.runNew(async () => {
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

test("LazyConnection.runNew() cancels an attempt to connect, and does not wait for it", async () => {
  const { lazy, calls } = driven();
  let got: Promise<Fake> | undefined;
  const error = new Error("400");
  const run = lazy.runNew(() => {
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

test("LazyConnection.runNew() leaves nothing to who keeps the context of a task", async (t) => {
  stubConnect(() => Promise.resolve(new Socket()));
  const ofSocket = new LazyConnection({ port: 1 });
  const lazy = new LazyConnection<Fake>(opener);
  const makes: Record<string, () => object | Promise<object>> = {
    "its stand-in": () => lazy.get(),
    "its stand-in, if it fails": async () => {
      const part = lazy.run(throws(new Error("part")));
      await part.catch(() => {});
      return await lazy.get();
    },
    "its result": () => ({}),
    "its error": () => throws(new Error("task"))(),
    "a part's error": async () => {
      const part = lazy.run(() => throws(new Error("part"))());
      return await reasonOf(part) as Error;
    },
    "the error of a part that fails late": () => {
      const error = new Error("part");
      lazy.run(() => flush().then(throws(error))).catch(() => {});
      return error;
    },
    "the function of a pending part": () => {
      const part = () => new Promise(() => {});
      lazy.run(part);
      return part;
    },
    "its socket": () => ofSocket.get(),
    "a socket that it closed": async () => {
      using conn = await ofSocket.connect();
      return conn;
    },
  };
  const contexts: unknown[] = [];
  for (const [name, make] of Object.entries(makes)) {
    await t.step(name, async () => {
      const inTask = async () => {
        let made: object | undefined;
        const task = async () => {
          contexts.push(AsyncLocalStorage.snapshot());
          return { made: made = await make() };
        };
        const run = (name.includes("socket") ? ofSocket : lazy).runNew(task);
        return await run.then(() => made!, (error) => made ?? error);
      };
      assert(await isCollected(inTask));
    });
  }
  assertEquals(contexts.length, Object.keys(makes).length);
});

// get()

test("LazyConnection.get() opens one connection for all who ask", async () => {
  const { lazy, calls } = driven();
  await lazy.runNew(async () => {
    const deep = async () => await lazy.get();
    const part = lazy.run(() => lazy.get());
    const gets = [lazy.get(), deep(), part, delay(0).then(() => lazy.get())];
    assertEquals(calls.length, 1);
    await delay(1);
    const fake = new Fake();
    calls[0]!.lend(fake).then(calls[0]!.resolve);
    const first = await lazy.get();
    assertInstanceOf(first, Fake);
    for (const got of await Promise.all(gets)) assertStrictEquals(got, first);
  });
  assertEquals(calls.length, 1);
});

test("LazyConnection.get() gives outside of tasks the socket of connect(), and opens nothing", async () => {
  const { lazy, sockets } = ofSockets();
  const message = "Cannot get a connection: there is no task; call runNew() " +
    "for a request, or run() for a function";
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(sockets.length, 0);
  const connect = lazy.connect();
  const early = lazy.get();
  {
    using conn = await connect;
    assertStrictEquals(await early, conn);
    assertStrictEquals(await lazy.get(), conn);
    const other = await lazy.runNew(() => lazy.get());
    assertNotStrictEquals(other, conn);
  }
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(sockets.length, 2);
  await lazy[Symbol.asyncDispose]();
  await assertRejects(() => lazy.get(), BadResource, DISPOSED);
});

test("LazyConnection.get() fails for all who wait if the opener fails, then tries again", async (t) => {
  const error = new Error("opener");
  const openers: Record<string, Opener<Fake>> = {
    "by throwing": throws(error),
    "by rejecting": () => Promise.reject(error),
    "by rejecting late": () => flush().then(throws(error)),
    "by never lending": () => Promise.resolve(),
  };
  for (const [name, failing] of Object.entries(openers)) {
    await t.step(name, async () => {
      let calls = 0;
      const lazy = new LazyConnection<Fake>((lend, signal) =>
        calls++ ? opener(lend) : failing(lend, signal)
      );
      await lazy.runNew(async () => {
        const get = lazy.get();
        const gets = name === "by throwing" ? [get] : [get, lazy.get()];
        await delay(0); // nobody awaits them yet, and the process goes on
        for (const reason of await Promise.all(gets.map(reasonOf))) {
          if (name !== "by never lending") assertStrictEquals(reason, error);
          else assertAwaitLend(reason, "has lent nothing");
        }
        assertInstanceOf(await lazy.get(), Fake);
      });
      assertEquals(calls, 2);
    });
  }
});

/** Asserts that an error says what an opener did wrong, and the way out. */
function assertAwaitLend(reason: unknown, state: string) {
  assertInstanceOf(reason, TypeError);
  const { message } = reason as TypeError; // not narrowed without std's types
  assertStringIncludes(message, state);
  assertStringIncludes(message, "it must `await lend(connection)`");
}

test("LazyConnection is loud about wrong use that nobody awaits", async () => {
  const unhandled: unknown[] = [];
  const listener = (event: PromiseRejectionEvent) => {
    event.preventDefault();
    unhandled.push(event.reason);
  };
  addEventListener("unhandledrejection", listener);
  const { lazy } = ofSockets();
  const inEnded = await endedTask(lazy);
  lazy.get();
  lazy.runNew(throws("runNew"));
  lazy.run(throws("run"));
  inEnded(() => lazy.run(() => {}));
  using _conn = await lazy.connect();
  lazy.connect();
  new LazyConnection<Deno.TcpConn>(() => Promise.resolve()).connect();
  await delay(1);
  removeEventListener("unhandledrejection", listener);
  const names = unhandled.map((e) => e instanceof Error ? e.name : e);
  assertEquals(names.sort(), [
    ...["AlreadyExists", "BadResource", "NotConnected", "TypeError"],
    ...["run", "runNew"],
  ]);
});

// connect()

test("LazyConnection.connect() and get() give a socket that each way to close it closes at once, and frees its task", async (t) => {
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
    async "close()"(open) {
      const conn = await open();
      conn.close();
      assertThrows(() => conn.close(), BadResource, "Bad resource ID");
      conn[Symbol.dispose]();
    },
    async "close() that throws"(open) {
      const conn = await open();
      Object.assign(conn, { open: false }); // as after Deno.startTls()
      assertThrows(() => conn.close(), BadResource, "Bad resource ID");
    },
  };
  for (const [name, way] of Object.entries(ways)) {
    await t.step(name, async () => {
      const { lazy, sockets } = ofSockets();
      const connect = () => lazy.connect();
      const get = () => lazy.get();
      const closesAndFrees = async (open: () => Promise<Deno.TcpConn>) => {
        await way(open);
        assert(!sockets.at(-1)!.open);
      };
      await closesAndFrees(connect);
      await closesAndFrees(connect);
      await assertRejects(get, NotConnected);
      await lazy.runNew(async () => {
        for (const open of [connect, get, connect]) await closesAndFrees(open);
      });
      assertEquals(sockets.length, 5);
    });
  }
});

test("LazyConnection.connect() gives the very socket", async () => {
  const { lazy, sockets } = ofSockets();
  using conn = await lazy.connect();
  assertStrictEquals<unknown>(conn, sockets[0]);
  assert(sockets[0]!.open);
});

test("LazyConnection.connect() leaves a later socket alone when an earlier one is closed again", async () => {
  const { lazy, sockets } = ofSockets();
  const first = await lazy.connect();
  first.close();
  using second = await lazy.connect();
  const earlier = [first, await lazy.runNew(() => lazy.get())];
  for (const conn of earlier) {
    assertThrows(() => conn.close(), BadResource);
    conn[Symbol.dispose]();
  }
  assertStrictEquals(await lazy.get(), second);
  assertEquals(sockets.map(({ open }) => open), [false, true, false]);
  await lazy[Symbol.asyncDispose]();
  for (const conn of [...earlier, second]) conn[Symbol.dispose]();
});

test("LazyConnection.connect() keeps nothing of a socket that was closed outside of tasks", async () => {
  stubConnect(() => Promise.resolve(new Socket()));
  const lazy = new LazyConnection({ port: 1 });
  const closed = async () => {
    using conn = await lazy.connect();
    return conn;
  };
  const disposed = async () => {
    const conn = await lazy.connect();
    await lazy[Symbol.asyncDispose]();
    return conn;
  };
  assert(await isCollected(closed));
  assert(await isCollected(disposed));
  await assertRejects(() => lazy.connect(), BadResource);
});

test("LazyConnection.connect() rejects if there is a socket or one is being opened", async () => {
  const { lazy, sockets } = ofSockets();
  const message = "Cannot connect: already connected or connecting; get() " +
    "gives that socket, close it first, or connect in runNew()";
  const task = async (open: () => Promise<Deno.TcpConn>) => {
    const opening = open();
    await assertRejects(() => lazy.connect(), AlreadyExists, message);
    const get = lazy.get();
    using conn = await opening;
    await assertRejects(() => lazy.connect(), AlreadyExists, message);
    assertStrictEquals(await get, conn);
    assertStrictEquals(await lazy.get(), conn);
  };
  await task(() => lazy.connect());
  await lazy.runNew(task, () => lazy.connect());
  await lazy.runNew(task, () => lazy.get());
  assertEquals(sockets.length, 3);
});

test("LazyConnection.connect() is refused with an opener, before anything is opened", async () => {
  const { lazy, calls } = driven<Deno.TcpConn>();
  const message =
    "Cannot connect: this LazyConnection is made from an opener; call get()";
  await assertRejects(() => lazy.connect(), TypeError, message);
  await assertRejects(() => lazy.runNew(() => lazy.connect()), TypeError);
  assertEquals(calls.length, 0);
  await lazy.runNew(async () => {
    lazy.get(); // is being opened
    await assertRejects(() => lazy.connect(), TypeError, message);
  });
  const inEnded = await endedTask(lazy);
  await assertRejects(() => inEnded(() => lazy.connect()), BadResource, ENDED);
  const others = [
    // @ts-expect-error only a TcpConn can be what options give
    () => driven<AsyncDisposable>().lazy.connect(),
    // @ts-expect-error only a TcpConn can be what options give
    () => driven<Deno.TlsConn>().lazy.connect(),
  ];
  for (const other of others) await assertRejects(other, TypeError);
});

netTest(
  "LazyConnection.connect() opens a TcpConn, which every way closes",
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
      "close()": async () => {
        using conn = await lazy.connect();
        conn.close();
        assertThrows(() => conn.close(), BadResource);
        return conn;
      },
      "the end of the task": () => lazy.runNew(() => lazy.get()),
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
  "LazyConnection.get() gives a thousand tasks a socket each at once",
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
      echoes.push(lazy.runNew(echo, id));
      const conn = await listener.accept();
      served.push(conn.readable.pipeTo(conn.writable));
    }
    all.resolve();
    assertEquals(await Promise.all(echoes), ids.map((id) => `task ${id}`));
    await Promise.all(served);
  },
);

// connect() and get() that are cancelled

test("LazyConnection.connect() rejects at once when its signal aborts, whatever is opened later", async () => {
  for (const reason of [new Error("enough"), "enough", null, 0]) {
    const opening: ((socket: Socket) => void)[] = [];
    const signals: AbortSignal[] = [];
    stubConnect((options) => {
      signals.push(options.signal!);
      return new Promise((resolve) => opening.push(resolve));
    });
    const lazy = new LazyConnection({ port: 1 });
    const controller = new AbortController();
    const { signal } = controller;
    const attempts = [lazy.connect({ signal })];
    await lazy.runNew(async () => {
      attempts.push(lazy.connect({ signal }), lazy.get());
      controller.abort(reason);
      for (const attempt of attempts) {
        assertStrictEquals(await reasonOf(attempt), reason);
      }
      assertEquals(signals.length, 2);
      for (const { reason: got } of signals) assertStrictEquals(got, reason);

      const connect = lazy.connect(); // the task is free
      const sockets = opening.map(() => new Socket());
      sockets.forEach((socket, i) => opening[i]!(socket));
      using conn = await connect;
      await flush();
      assertEquals(sockets.map(({ open }) => open), [false, false, true]);
      assertStrictEquals(await lazy.get(), conn);
    });
  }
});

test("LazyConnection.connect() does not start with an aborted or invalid signal", async () => {
  const { lazy, sockets } = ofSockets();
  const reason = { own: "reason" };
  const aborted = AbortSignal.abort(reason);
  assertStrictEquals(await reasonOf(lazy.connect({ signal: aborted })), reason);
  for (const invalid of [{ aborted: false }, null, 0]) { // a polyfill's, say
    const signal = invalid as AbortSignal;
    await assertRejects(() => lazy.connect({ signal }), TypeError);
  }
  assertEquals(sockets.length, 0);
  using _conn = await lazy.connect({ signal: undefined });
});

test("LazyConnection.connect() heeds the signal of the options besides its own, and get() does", async () => {
  stubConnect(() => new Promise(() => {})); // never answers
  for (const which of [0, 1]) {
    const controllers = [new AbortController(), new AbortController()] as const;
    const [{ signal }, options] = controllers;
    const lazy = new LazyConnection({ port: 1, signal: options.signal });
    await lazy.runNew(async () => {
      const attempts = [lazy.connect({ signal }), lazy.get()];
      controllers[which]!.abort("enough");
      for (const attempt of attempts) {
        assertEquals(await reasonOf(attempt), "enough");
      }
      if (which === 1) assertEquals(await reasonOf(lazy.get()), "enough");
    });
  }
});

netTest(
  "LazyConnection.connect() closes a socket that opened as its signal aborted",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr;
    const { connect } = Deno;
    for (const own of [true, false]) {
      const controller = new AbortController();
      let conn: Deno.TcpConn | undefined;
      // As Deno.connect() does, where the abort comes between its last two steps
      stubConnect(async (options) => {
        try {
          return conn = await connect({ port: options.port });
        } finally {
          controller.abort("enough");
          options.signal!.throwIfAborted();
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
    const connect = lazy.connect({ signal: controller.signal });
    controller.abort("enough");
    assertEquals(await reasonOf(connect), "enough");
    await lazy[Symbol.asyncDispose]();
  },
);

test("LazyConnection.connect() and get() abort no signal of an opener that has lent or settled", async () => {
  const { lazy, calls } = driven();
  await lazy.runNew(async () => {
    const failed = lazy.get();
    calls[0]!.reject(new Error("opener"));
    await assertRejects(() => failed, Error, "opener");
    lazy.get();
    calls[1]!.lend(new Fake()).then(calls[1]!.resolve);
  });
  await lazy[Symbol.asyncDispose]();
  assertEquals(calls.map(({ signal }) => signal.aborted), [false, false]);

  const { lazy: ofSocket } = ofSockets();
  const controller = new AbortController();
  using conn = await ofSocket.connect({ signal: controller.signal });
  controller.abort();
  assertStrictEquals(await ofSocket.get(), conn);
});

test("LazyConnection.get() has nobody hear of an opener that was cancelled and goes on", async () => {
  const { lazy, calls } = driven();
  await lazy.runNew(() => void lazy.get());
  await lazy.runNew(async () => {
    lazy.get();
    calls[1]!.lend(new Fake()).then(calls[1]!.resolve);
    assertEquals((await lazy.get()).query(""), 1);
  });
  const disposal = lazy[Symbol.asyncDispose]();
  assert(await isPending(disposal));
  calls[0]!.reject(new Error("late"));
  await disposal;
});

test("LazyConnection.get() may be called by who listens to the opener's signal", async () => {
  const again: Promise<Fake>[] = [];
  const lazy = new LazyConnection<Fake>((_lend, signal) => {
    const listener = AsyncLocalStorage.bind(() => again.push(lazy.get()));
    if (again.length === 0) signal.addEventListener("abort", listener);
    return new Promise(() => {}); // never answers
  });
  await lazy.runNew(() => void lazy.get());
  await assertRejects(() => again[0]!, BadResource, ENDED);

  const disposed: LazyConnection<Fake> = new LazyConnection<Fake>(
    async (_lend, signal) => {
      const listener = AsyncLocalStorage.bind(() => again.push(disposed.get()));
      signal.addEventListener("abort", listener);
      await delay(1);
    },
  );
  await disposed.runNew(async () => {
    disposed.get();
    await disposed[Symbol.asyncDispose]();
  });
  await assertRejects(() => again[1]!, BadResource, DISPOSED);

  const controller = new AbortController();
  const { signal } = controller;
  const sockets = new LazyConnection({ port: 1, signal });
  let later: Promise<Deno.TcpConn> | undefined;
  stubConnect((options) => {
    options.signal!.addEventListener("abort", () => later ??= sockets.get());
    return new Promise(() => {});
  });
  await sockets.runNew(async () => {
    const first = sockets.get();
    controller.abort("enough");
    assertNotStrictEquals(later, first);
    assertEquals(await reasonOf(later!), "enough");
  });
});

test("LazyConnection.connect() leaves nothing at a signal that attempts share", async () => {
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

test("LazyConnection[Symbol.asyncDispose]() takes every connection", async () => {
  const { lazy, calls } = driven();
  const run = lazy.runNew(async () => {
    const get = lazy.get();
    const lent = calls[0]!.lend(new Fake());
    const fake = await get;
    const disposal = lazy[Symbol.asyncDispose]();
    const message = `Cannot use the connection: ${DISPOSED}`;
    const error = assertThrows(() => fake.query(""), BadResource, message);
    assertStrictEquals(await reasonOf(lent), error);
    assertStrictEquals(thrownBy(() => fake.outcome = ""), error);
    const late = `Cannot get a connection: ${DISPOSED}`;
    await assertRejects(() => lazy.get(), BadResource, late);
    assert(await isPending(disposal));
    assertEquals(await lazy.run(() => 1), 1);
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
  const runs = [lazy.runNew(task), lazy.runNew(task)];
  const idle = lazy.runNew(() => end.promise);
  await flush();
  await lazy[Symbol.asyncDispose](); // the openers reject with its error
  end.resolve();
  await idle;
  for (const reason of await Promise.all(runs.map(reasonOf))) {
    assertInstanceOf(reason, BadResource);
  }

  const { lazy: ofSocket } = ofSockets();
  const left = ofSocket.runNew(async () => {
    {
      using _conn = await ofSocket.connect();
    }
    await ofSocket[Symbol.asyncDispose]();
  });
  await left; // it had none any more
});

test("LazyConnection[Symbol.asyncDispose]() leaves the task its own error", async () => {
  for (const when of ["before", "after"]) {
    const lazy = new LazyConnection<Fake>(opener);
    const error = new Error("task");
    const run = lazy.runNew(async () => {
      await lazy.get();
      if (when === "before") await lazy.run(throws(error)).catch(() => {});
      await lazy[Symbol.asyncDispose]();
      if (when === "after") throw error;
    });
    const reason = await reasonOf(run);
    const got = when === "before" ? (reason as Error).cause : reason;
    assertStrictEquals(got, error);
  }
});

test("LazyConnection[Symbol.asyncDispose]() cancels every attempt, and waits for all openers", async () => {
  const { lazy, calls } = driven();
  await lazy.runNew(async () => { // after which there is nothing to wait for
    const get = lazy.get();
    calls[0]!.lend(new Fake()).then(calls.shift()!.resolve);
    await get;
  });
  const attempts = [1, 2].map(() => reasonOf(lazy.runNew(() => lazy.get())));
  const floating = lazy.runNew(() => {
    lazy.get(); // nobody awaits it, and the process goes on
    return flush();
  });
  const disposal = lazy[Symbol.asyncDispose]();
  const again = lazy[Symbol.asyncDispose]();
  const reasons = await Promise.all(attempts);
  await floating;
  assertEquals(calls.length, 3);
  for (const { lend, signal, resolve } of calls) {
    assertInstanceOf(signal.reason, BadResource);
    assertEquals(signal.reason.message, `Cannot connect: ${DISPOSED}`);
    assertStrictEquals(await reasonOf(lend(new Fake())), signal.reason);
    assert(await isPending(disposal));
    assert(await isPending(again));
    resolve();
  }
  const signaled = calls.slice(0, 2).map(({ signal }) => signal.reason);
  assertEquals(reasons, signaled);
  await Promise.all([disposal, again]);
});

test("LazyConnection[Symbol.asyncDispose]() refuses whatever comes later, with an error made where it was called", async () => {
  const { lazy, sockets } = ofSockets();
  await lazy[Symbol.asyncDispose]();
  await lazy[Symbol.asyncDispose]();
  let called = 0;
  const refused: [act: string, () => Promise<unknown>][] = [
    ["connect", () => lazy.connect()],
    ["get a connection", () => lazy.get()],
    ["start a task", () => lazy.run(() => called++)],
    ["start a task", () => lazy.runNew(() => called++)],
  ];
  for (const [act, fn] of refused) {
    const calledHere = () => fn();
    const error = await assertRejects(calledHere, BadResource);
    assertEquals(error.message, `Cannot ${act}: ${DISPOSED}`);
    assertStringIncludes(error.stack!, "calledHere");
    assertNotStrictEquals(await reasonOf(fn()), error);
  }
  lazy.connect(); // nobody awaits it, and the process goes on
  assertEquals([called, sockets.length], [0, 0]);
});

test("LazyConnection[Symbol.asyncDispose]() closes the socket of a block, also outside of tasks", async () => {
  const { lazy, sockets } = ofSockets();
  using _outside = await lazy.connect();
  const run = lazy.runNew(async () => {
    using _conn = await lazy.connect();
    await lazy[Symbol.asyncDispose]();
    assertEquals(sockets.map(({ open }) => open), [false, false]);
    await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  });
  await assertRejects(() => run, BadResource, DISPOSED);
  await assertRejects(() => lazy.get(), BadResource, DISPOSED);
});

test("LazyConnection[Symbol.asyncDispose]() lets a task that has ended commit", async () => {
  const { lazy, calls } = driven();
  const run = lazy.runNew(async () => {
    const get = lazy.get();
    calls[0]!.lend(new Fake());
    await get;
  });
  await flush();
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
  const run = lazy.runNew(() => lazy.get());
  await assertRejects(() => run, BadResource, DISPOSED);
  await disposal;
  assert(closed);
});

// Opener

test("Opener's lend() rejects the second time, with why the task failed", async () => {
  const error = new Error("40001");
  const message =
    "Cannot lend: the opener has lent already; retry around runNew()";
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
  const run = lazy.runNew(async () => {
    await lazy.get();
    await flush();
    throw error;
  });
  assertStrictEquals(await reasonOf(run), again[1]);
  assertEquals("cause" in again[0]!, false);
  assertStrictEquals(again[1]!.cause, error);
});

test("Opener's lend() refuses another task's connection, and the opener may lend another", async () => {
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
  await lazy.runNew(async () => {
    await query();
    await lazy.runNew(query);
    assertEquals([shared.sent.length, spare.sent.length], [1, 1]);
    const message = "Cannot lend: another task has this connection";
    assertStringIncludes(String(refused), message);
  });
  await lazy.runNew(query); // it is free again
  assertEquals([shared.sent.length, spare.sent.length], [2, 1]);

  const unmoved = new LazyConnection<Fake>((lend) => lend(shared));
  await unmoved.runNew(async () => {
    await unmoved.get();
    await assertRejects(() => unmoved.runNew(() => unmoved.get()), Busy);
  });
});

test("Opener's lend() refuses what is no object, or a promise, and the opener may lend another", async () => {
  const answersAll = new Proxy({}, { get: () => () => {} }); // also for `then`
  const promises = [Promise.resolve({}), answersAll];
  const values = [undefined, null, 1, "a", Symbol("a"), ...promises];
  for (const value of values) {
    let refusals = 0;
    const lazy = new LazyConnection<Fake>(async (lend) => {
      const message = "Cannot lend: the connection must be an object, " +
        "and no promise";
      const refused = lend(value as unknown as Fake); // the types forbid it
      await assertRejects(() => refused, TypeError, message);
      refusals++;
      await lend(new Fake());
    });
    const lent = await lazy.runNew(async () => [await lazy.get()]);
    assertInstanceOf(lent[0], Fake);
    assertEquals(refusals, 1);
  }
});

test("Opener's lend() may be handed on", async () => {
  const outcomes: string[] = [];
  const transaction = async <T>(fn: (fake: Fake) => Promise<T>): Promise<T> => {
    const result = await fn(new Fake());
    outcomes.push("committed");
    return result;
  };
  const lazy = new LazyConnection<Fake>((lend) => transaction(lend));
  await lazy.runNew(() => lazy.get());
  assertEquals(outcomes, ["committed"]);
});

test("Opener's lend() lets a pool hand a connection on from within closing", async () => {
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
      await flush();
    }
  });
  const task = () => lazy.runNew(() => lazy.get());
  await Promise.all([task(), task(), task()]);
  assertEquals(free, [pooled]);
});

test("Opener is called as a function of its own", async () => {
  const receivers: unknown[] = [];
  const lazy = new LazyConnection<Fake>(function (this: unknown, lend) {
    receivers.push(this);
    return opener(lend);
  });
  await lazy.runNew(() => lazy.get());
  assertEquals(receivers, [undefined]);
});

test("Opener that settles before the task fails it with one error", async (t) => {
  const error = new Error("server gone");
  const task = new Error("task");
  const wrapper = new Error("wrapper", { cause: error });
  const done = "its opener has settled before the task";
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
      let left!: { fake: Fake; get: () => Promise<Fake> };
      const run = lazy.runNew(async () => {
        const get = lazy.get();
        const lent = calls[0]!.lend(new Fake());
        const fake = await get;
        if (over) calls[0]!.reject(over);
        else calls[0]!.resolve();
        await flush();
        const reason = await reasonOf(lazy.get());
        if (over) assertStrictEquals(reason, over);
        else assertAwaitLend(reason, done);
        assertStrictEquals(await reasonOf(lent), reason);
        assertStrictEquals(thrownBy(() => fake.query("")), reason);
        assertEquals(calls.length, 1);
        const inTask = AsyncLocalStorage.snapshot();
        left = { fake, get: () => inTask(() => lazy.get()) };
        if (own) throw own;
      });
      const reason = await reasonOf(run);
      if (got === SuppressedError) assertBoth(reason, own, over);
      else if (typeof got === "object") assertStrictEquals(reason, got);
      else assertAwaitLend(reason, done);
      assertThrows(() => left.fake.query(""), BadResource, ENDED);
      await assertRejects(left.get, BadResource, ENDED);
    });
  }
});

test("Opener's lend() rejects with why the attempt failed once the opener has settled", async () => {
  const { lazy, calls } = driven();
  await lazy.runNew(async () => {
    const get = lazy.get();
    calls[0]!.resolve();
    const reason = await reasonOf(get);
    assertStrictEquals(await reasonOf(calls[0]!.lend(new Fake())), reason);
    lazy.get();
    assertEquals(calls.length, 2);
  });
});

// The stand-in

/** Calls a function in a task that has a connection, with its stand-in. */
async function withStandIn<C extends object>(
  connection: C,
  fn: (standIn: C) => unknown,
): Promise<void> {
  const lazy = new LazyConnection<C>((lend) => lend(connection));
  await lazy.runNew(async () => await fn(await lazy.get()));
}

/** A client of all that one can have. */
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
  await withStandIn(client, (standIn) => {
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
  await withStandIn(client, (standIn) => {
    for (const got of [standIn.on(), standIn.self, standIn.owner]) {
      assertStrictEquals(got, standIn);
    }
  });
  const fn = Object.assign(() => fn, { sql: () => fn, self: {} });
  fn.self = fn;
  await withStandIn(fn, (standIn) => {
    for (const got of [standIn(), standIn.sql(), standIn.self]) {
      assertStrictEquals<unknown>(got, standIn);
    }
  });
});

test("the stand-in works for a function, with functions of its own", async () => {
  const sql = Object.assign(
    (text: TemplateStringsArray, ...values: number[]) =>
      text.raw.join("$") + values,
    { typed: Object.assign(() => "typed", { date: () => "date" }) },
  );
  const lazy = new LazyConnection<typeof sql>((lend) => lend(sql));
  const left = await lazy.runNew(async () => {
    const tag = await lazy.get();
    assertEquals(tag`SELECT ${1}`, "SELECT $1");
    assertEquals([tag.typed(), tag.typed.date()], ["typed", "date"]);
    return { tag };
  });
  assertThrows(() => left.tag`SELECT ${2}`, BadResource);
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
  await withStandIn(client, (standIn) => {
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
    let left: { standIn: Client; query: Client["query"] };
    const run = withStandIn(client, (standIn) => {
      left = { standIn, query: standIn.query };
      if (error) throw error;
    });
    assertStrictEquals(await run.catch((reason) => reason), error);
    const { standIn, query } = left!;
    const uses: (() => unknown)[] = [
      () => standIn.query("late"),
      () => query.call(standIn, "late"),
      () => query("late"),
      () => standIn.nextLevel,
      () => standIn.sent,
      () => standIn.length = 2,
      () => standIn.level = 2,
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

test("the stand-in may be what the function of its task resolves to", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const standIn = await lazy.runNew(() => lazy.get());
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
    "when the task ends; use const, not using";
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
  await withStandIn<AsyncDisposable & Disposable>(client, (given) => {
    standIn = given;
    return refuse();
  });
  await refuse(); // also once the task has ended
  assertEquals([disposals, client.queries], [0, 0]);
});

test("the stand-in leaves no trace of a method that is patched and put back", async () => {
  const client = Object.assign(new Client(), { owner: {} });
  const { query } = client;
  await withStandIn(client, (standIn) => {
    const { query } = standIn;
    standIn.query = (sql) => query.call(standIn, `/* traced */ ${sql}`);
    standIn.query("a");
    standIn.query = query;
    standIn.owner = standIn;
  });
  assertStrictEquals(client.query, query);
  assertStrictEquals<unknown>(client.owner, client);
  await withStandIn(client, (standIn) => standIn.query("b"));
  assertEquals(client.sent, ["/* traced */ a", "b"]);
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
  await withStandIn(client, (standIn) => standIn.onmessage = handler);
  assertStrictEquals(handlers[0], handler);
});

test("the stand-in gives what is frozen as it is", async () => {
  const client = Object.assign(() => {}, { query() {} });
  const frozen: Readonly<{ client: object; self?: object }> = { client };
  Object.assign(frozen, { self: frozen });
  Object.freeze(frozen);
  await withStandIn(frozen, (standIn) => {
    assertStrictEquals(standIn.client, client);
    assertStrictEquals(standIn.self, frozen);
  });
  const readOnly = Object.defineProperty({ client }, "client", {
    writable: false,
  });
  for (const other of [{ client }, Object.seal({ client }), readOnly]) {
    await withStandIn(other, (standIn) => {
      assertNotStrictEquals(standIn.client, client);
    });
  }
});

test("the stand-in keeps no function that an accessor makes anew", async () => {
  await withStandIn(new Client(), async (standIn) => {
    assert(await isCollected(() => standIn.quoter));
    standIn.query("");
  });
});

// demo.ts

netTest(
  "demo shows two sockets at once, and what else a LazyConnection does",
  async () => {
    const lines: string[] = [];
    await main([], (line) => lines.push(line));
    const addresses = lines.splice(0, 2).map((line) =>
      line.match(/^task [12]: connected from (127\.0\.0\.1:\d+)$/)![1]
    );
    assertEquals(new Set(addresses).size, 2);
    const got = lines.splice(0, 2).sort();
    assertMatch(got[0]!, /^task 1: got \d+ bytes$/);
    assertEquals(got[1], got[0]!.replace("task 1", "task 2"));
    assertEquals(lines, [
      "a second connect() in a task is refused: AlreadyExists",
      "a connect() whose signal aborts is cancelled: AbortError",
      "a task of two functions commits: debit and credit stored",
      "a task whose second function fails rolls back: nothing stored",
      "a runNew() inside a task that fails is kept: audit stored",
    ]);
    const usage = "Cannot run the demo: give HOST and PORT, or nothing";
    await assertRejects(() => main(["127.0.0.1"], () => {}), TypeError, usage);
  },
);
