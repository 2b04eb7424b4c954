// Copyright 2026 the LazyConnection authors. MIT license.

import { AsyncLocalStorage } from "node:async_hooks";
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertNotEquals,
  assertNotStrictEquals,
  assertRejects,
  assertStrictEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { delay } from "@std/async/delay";
import { main } from "./demo.ts";
import { LazyConnection, type Opener, revocable } from "./mod.ts";

const { AlreadyExists, BadResource, Busy, NotConnected } = Deno.errors;
const DISPOSED = "Cannot use the LazyConnection: it has been disposed of";
const ENDED = "Cannot connect: the task has ended, start another with run()";
const OVER = "Cannot use the connection: the opener is over, it must " +
  "`await lend(connection)` until its task is over";

/** A test that leaves nothing open; Deno.test() fails on unhandled rejections. */
function test(name: string, fn: (t: Deno.TestContext) => Promise<void>) {
  Deno.test({ name, fn, sanitizeOps: true, sanitizeResources: true });
}

/** A connection that knows what became of it. */
class Fake implements Disposable {
  outcome: unknown = "open";
  [Symbol.dispose]() {}
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
    calls.push({ lend, signal, ...Promise.withResolvers<void>() });
    return calls.at(-1)!.promise;
  });
  return { lazy, calls };
}

/** Lets all promises settle that can: no chain of ours is that long. */
async function settled(ticks = 50): Promise<void> {
  for (let i = 0; i < ticks; i++) await null;
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
async function reasonOf(promise: Promise<unknown>): Promise<unknown> {
  const [settled] = await Promise.allSettled([promise]);
  if (settled.status === "rejected") return settled.reason;
  throw new Error("The promise did not reject");
}

/** Asserts that an error says of two that the later suppressed the earlier. */
function assertBoth(both: unknown, earlier: unknown, later: unknown) {
  assertInstanceOf(both, SuppressedError);
  // Not narrowed where std comes without types
  const { error, suppressed, message } = both as SuppressedError;
  assertEquals(
    message,
    "Cannot close the connection: there was another error before",
  );
  assertStrictEquals(error, later);
  assertStrictEquals(suppressed, earlier);
}

// new LazyConnection()

test("LazyConnection constructor opens nothing", async () => {
  const { lazy, calls } = driven();
  assertEquals(lazy.current, undefined);
  await lazy.run(() => {});
  assertEquals(calls, []);
});

test("LazyConnection constructor takes an opener that lends, or options for a TcpConn", async () => {
  const lazy: LazyConnection<Deno.TcpConn> = new LazyConnection({ port: 1 });
  const wider: LazyConnection<Disposable> = lazy;
  const things = new LazyConnection<{ thing: 1 }>((lend) => lend({ thing: 1 }));
  const openers: Opener<Disposable>[] = [opener, (lend) => lend(new Fake())];
  // @ts-expect-error options give a TcpConn
  new LazyConnection<Deno.TlsConn>({ port: 1 });
  // @ts-expect-error an opener lends, it returns nothing
  new LazyConnection<Fake>(() => Promise.resolve(new Fake()));
  // @ts-expect-error an opener lends what the LazyConnection is for
  new LazyConnection<Fake>((lend) => lend(new Date()));
  // @ts-expect-error a block can't dispose of it
  const refused = things.connect();
  await assertRejects(
    () => refused,
    TypeError,
    "a block cannot dispose of it, call get()",
  );
  assertEquals([wider.current, openers.length], [undefined, 2]);
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
  const query: PromiseLike<Fake> = {
    then: (...args) => lazy.get().then(...args),
  };
  for (const run of [lazy.run, lazy.runOrJoin]) {
    const fake = await run.call(lazy, () => query);
    assertEquals((fake as Fake).outcome, "committed");
  }
});

test("LazyConnection.run() gives each task a connection of its own", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const task = async () => {
    assertEquals(lazy.current, undefined);
    const fake = await lazy.get();
    await delay(1);
    assertStrictEquals(lazy.current, fake);
    return fake;
  };
  await using main = await lazy.connect();
  const fakes = await lazy.run(async () => {
    const outer = await task();
    const inner = await Promise.all([lazy.run(task), lazy.run(task)]);
    assertEquals(inner.map((fake) => fake.outcome), ["committed", "committed"]);
    assertStrictEquals(lazy.current, outer);
    assertEquals(outer.outcome, "open");
    return [main, outer, ...inner];
  });
  assertEquals(new Set(fakes).size, 4);
  assertStrictEquals(lazy.current, main);
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

test("LazyConnection.run() leaves nothing to what outlives it", async () => {
  const { lazy, calls } = driven();
  const leftover = await lazy.run(() => AsyncLocalStorage.snapshot());
  await assertRejects(() => leftover(() => lazy.get()), BadResource, ENDED);
  await assertRejects(() => leftover(() => lazy.connect()), BadResource, ENDED);
  leftover(() => lazy.get()); // nobody awaits it, and the process goes on
  assertEquals(leftover(() => lazy.current), undefined);
  assertEquals(await leftover(() => lazy.run(() => 1)), 1);
  assertEquals(calls, []);
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
    await assertRejects(() => lazy.connect(), BadResource, ENDED);
    assertEquals(await lazy.runOrJoin(() => lazy.current), undefined);
  });
  await lazy.run(() => lazy.get());
});

test("LazyConnection.run() rejects with what the opener rejects with", async () => {
  const error = new Error("COMMIT refused");
  const lazy = new LazyConnection<Fake>(async (lend) => {
    await opener(lend);
    throw error;
  });
  assertStrictEquals(await reasonOf(lazy.run(() => lazy.get())), error);
});

test("LazyConnection.run() and lend() reject with the very error of the function", async () => {
  for (const error of [new Error("task"), "task", null, undefined, NaN]) {
    for (const fail of [() => Promise.reject(error), throws(error)]) {
      const lazy = new LazyConnection<Fake>(opener);
      let fake: Fake | undefined;
      const run = lazy.run(async () => {
        fake = await lazy.get();
        await fail();
      });
      assertStrictEquals(await reasonOf(run), error);
      assertStrictEquals(fake!.outcome, error);
      assertStrictEquals(await reasonOf(lazy.run(fail)), error);
    }
  }
});

test("LazyConnection.run() rejects with the error of the opener that carries the function's, else with both", async (t) => {
  const task = new Error("task");
  const other = new Error("other");
  const cyclic = new Error("cyclic");
  cyclic.cause = cyclic;
  const wrapped = new Error("wrapped", { cause: task });
  const deep = new Error("deep", {
    cause: new SuppressedError(other, wrapped),
  });
  const both = Symbol("both");
  const cases: Record<string, [E: unknown, F: unknown, got: unknown]> = {
    "the same": [task, task, task],
    "its cause": [task, wrapped, wrapped],
    "what it suppressed": [task, deep, deep],
    "carried the other way": [wrapped, task, wrapped],
    "unrelated": [task, other, both],
    "a cycle": [task, cyclic, both],
    "no error": [undefined, other, both],
    "no error either": [other, undefined, both],
    "a cause that is none": [undefined, new Error("", { cause: null }), both],
  };
  for (const [name, [E, F, got]] of Object.entries(cases)) {
    await t.step(name, async () => {
      const lazy = new LazyConnection<Fake>(async (lend) => {
        await opener(lend).catch(() => {});
        throw F;
      });
      const run = lazy.run(async () => {
        await lazy.get();
        throw E;
      });
      const error = await reasonOf(run);
      if (got !== both) return assertStrictEquals(error, got);
      assertBoth(error, E, F);
    });
  }
});

test("LazyConnection.run() cancels an attempt to connect, and does not wait for it", async () => {
  const { lazy, calls } = driven();
  let got: Promise<Fake> | undefined;
  const error = new Error("400");
  const run = lazy.run(() => {
    got = lazy.get(); // nobody awaits it yet, and the process goes on
    throw error;
  });
  assertStrictEquals(await reasonOf(run), error);
  const [call] = calls;
  const reason = await assertRejects(() => got!, BadResource, ENDED);
  assertStrictEquals(call!.signal.reason, reason);
  assertStrictEquals(await reasonOf(call!.lend(new Fake())), reason);
  call!.reject(new Error("of an opener that nobody waits for"));
});

// runOrJoin()

test("LazyConnection.runOrJoin() is a part of the task, or a task where there is none", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  const part = (...args: number[]) =>
    lazy.runOrJoin(async (...args) => ({
      fake: await lazy.get(),
      sum: args.reduce((a, b) => a + b),
    }), ...args);
  const alone = await part(1, 2);
  assertEquals(alone.sum, 3);
  assertEquals(alone.fake.outcome, "committed");
  const leftover = await lazy.run(async () => {
    const [a, b] = await Promise.all([part(1), part(2)]);
    assertStrictEquals(a!.fake, b!.fake);
    assertStrictEquals(lazy.current, a!.fake);
    return AsyncLocalStorage.snapshot();
  });
  assertEquals((await leftover(() => part(1))).fake.outcome, "committed");
});

test("LazyConnection.runOrJoin() fails the whole task, even if its error was caught", async () => {
  const error = new Error("part");
  const lazy = new LazyConnection<Fake>(opener);
  let fake: Fake | undefined;
  const run = lazy.run(async () => {
    fake = await lazy.get();
    const part = lazy.runOrJoin(throws(error));
    assertStrictEquals(await reasonOf(part), error);
    assertEquals(fake.outcome, "open");
  });
  assertStrictEquals(await reasonOf(run), error);
  assertStrictEquals(fake!.outcome, error);
});

test("LazyConnection.runOrJoin() leaves the task its own error", async () => {
  const error = new Error("task");
  const lazy = new LazyConnection<Fake>(opener);
  const run = lazy.run(async () => {
    await lazy.runOrJoin(throws(new Error("part"))).catch(() => {});
    throw error;
  });
  assertStrictEquals(await reasonOf(run), error);
});

test("LazyConnection.runOrJoin() fails the task with an error that carries the opener's", async () => {
  const error = new Error("opener");
  const wrapped = new Error("wrapped", { cause: error });
  const lazy = new LazyConnection<Fake>(async (lend) => {
    await opener(lend).catch(() => {});
    throw error;
  });
  const run = lazy.run(async () => {
    await lazy.get();
    await lazy.runOrJoin(throws(wrapped)).catch(() => {});
  });
  assertStrictEquals(await reasonOf(run), wrapped);
});

test("LazyConnection.runOrJoin() cannot fail a task that has ended", async () => {
  const { lazy, calls } = driven();
  const end = Promise.withResolvers<void>();
  let part: Promise<void> | undefined;
  const run = lazy.run(async () => {
    const get = lazy.get();
    calls[0]!.lend(new Fake());
    await get;
    part = lazy.runOrJoin(() => end.promise);
  });
  await settled();
  end.reject(new Error("late"));
  await assertRejects(() => part!, Error, "late");
  calls[0]!.resolve();
  await run;
});

// get()

test("LazyConnection.get() opens one connection for all who ask", async () => {
  const { lazy, calls } = driven();
  const fake = new Fake();
  await lazy.run(async () => {
    const deep = async () => await lazy.get();
    const gets = [lazy.get(), deep(), delay(0).then(() => lazy.get())];
    assertEquals(calls.length, 1);
    await delay(1);
    calls[0]!.lend(fake).then(calls[0]!.resolve);
    for (const got of await Promise.all(gets)) assertStrictEquals(got, fake);
    assertStrictEquals(await lazy.get(), fake);
    assertStrictEquals(lazy.current, fake);
  });
  assertEquals(calls.length, 1);
});

test("LazyConnection.get() rejects outside of run(), whatever was connected there", async () => {
  const { lazy, calls } = driven();
  const message = "Cannot get a connection: there is no task, call run() first";
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(calls.length, 0);
  const connect = lazy.connect();
  await assertRejects(() => lazy.get(), NotConnected, message);
  calls[0]!.lend(new Fake());
  await connect;
  await assertRejects(() => lazy.get(), NotConnected, message);
  assertEquals(calls.length, 1);
});

test("LazyConnection.get() gives any object as it is", async () => {
  const objects = [Object.freeze(new Fake()), new Date(), () => {}, new Fake()];
  for (const object of objects) {
    const before = Object.getOwnPropertyDescriptors(object);
    const lazy = new LazyConnection<object>((lend) => lend(object));
    await lazy.run(async () => {
      assertStrictEquals(await lazy.get(), object);
      assertEquals(Object.getOwnPropertyDescriptors(object), before);
    });
    assertEquals(Object.getOwnPropertyDescriptors(object), before);
  }
});

test("LazyConnection.get() waits for what connect() opens", async () => {
  const { lazy, calls } = driven();
  await lazy.run(async () => {
    const connect = lazy.connect();
    const get = lazy.get();
    calls[0]!.lend(new Fake()).catch(calls[0]!.resolve);
    using conn = await connect;
    assertStrictEquals(await get, conn);
    assertEquals(calls.length, 1);
  });
});

test("LazyConnection.get() fails for all who wait if the opener fails, then tries again", async (t) => {
  const error = new Error("opener");
  const openers: Record<string, Opener<Fake>> = {
    "by throwing": throws(error),
    "by rejecting": () => Promise.reject(error),
    "by never lending": () => Promise.resolve(),
  };
  for (const [name, failing] of Object.entries(openers)) {
    await t.step(name, async () => {
      const next = [failing, opener, failing, opener].values();
      const lazy = new LazyConnection<Fake>((lend, signal) =>
        next.next().value!(lend, signal)
      );
      const run = lazy.run(async () => {
        const gets = await Promise.allSettled([lazy.get(), lazy.get()]);
        for (const get of gets.filter(({ status }) => status === "rejected")) {
          checkFailure((get as PromiseRejectedResult).reason);
        }
        return await lazy.get();
      });
      assertEquals((await run).outcome, "committed");
      checkFailure(await reasonOf(lazy.connect()));
      using _conn = await lazy.connect();
    });
  }
  function checkFailure(reason: unknown) {
    if (reason === error) return;
    assertInstanceOf(reason, TypeError);
    assertStringIncludes(String(reason), OVER);
  }
});

test("LazyConnection.get() and connect() wait for an earlier connection to close", async () => {
  const { lazy, calls } = driven();
  await lazy.run(async () => {
    const first = lazy.connect();
    calls[0]!.lend(new Fake());
    (await first)[Symbol.dispose]();
    assertEquals(lazy.current, undefined);
    const gets = [lazy.get(), lazy.get()];
    await assertRejects(() => lazy.connect(), AlreadyExists);
    await settled();
    assertEquals(calls.length, 1);
    calls[0]!.resolve();
    await settled();
    assertEquals(calls.length, 2);
    const fake = new Fake();
    calls[1]!.lend(fake).then(calls[1]!.resolve);
    assertEquals(await Promise.all(gets), [fake, fake]);
  });
});

test("LazyConnection.connect() calls the opener at once if no connection is closing", async () => {
  const { lazy, calls } = driven();
  for (const key of [Symbol.dispose, Symbol.asyncDispose] as const) {
    const connect = lazy.connect();
    assertEquals(calls.length, 1);
    calls[0]!.lend(new Fake()).catch(calls[0]!.resolve);
    (await connect)[key]();
    await settled();
    calls.length = 0;
  }
  lazy.connect();
  assertEquals(calls.length, 1);
});

// connect()

test("LazyConnection.connect() rejects if the task has a connection or is opening one", async () => {
  const { lazy, calls } = driven();
  const message = "Cannot connect: the task is already connected or " +
    "connecting, leave that block or start another task with run()";
  const connect = lazy.connect();
  await assertRejects(() => lazy.connect(), AlreadyExists, message);
  calls[0]!.lend(new Fake());
  const conn = await connect;
  await assertRejects(() => lazy.connect(), AlreadyExists, message);
  assertStrictEquals(lazy.current, conn);
  assertEquals(calls.length, 1);
});

test("LazyConnection.connect() is freed by each way to leave a block, which is no success", async (t) => {
  type Lazy = LazyConnection<Fake & Partial<AsyncDisposable>>;
  const ways: Record<string, (lazy: Lazy) => Promise<Fake>> = {
    async "using"(lazy) {
      using fake = await lazy.connect();
      return fake;
    },
    async "await using"(lazy) {
      await using fake = await lazy.connect();
      return fake;
    },
    async "[Symbol.dispose]()"(lazy) {
      const fake = await lazy.connect();
      fake[Symbol.dispose]();
      return fake;
    },
    async "[Symbol.asyncDispose]()"(lazy) {
      const fake = await lazy.connect();
      await fake[Symbol.asyncDispose]();
      return fake;
    },
  };
  for (const [name, leave] of Object.entries(ways)) {
    await t.step(name, async () => {
      const lazy = new LazyConnection<Fake>(opener);
      const block = async () => {
        const fake = await leave(lazy);
        assertEquals(lazy.current, undefined);
        await settled();
        assertInstanceOf(fake.outcome, BadResource);
        assertStringIncludes(
          String(fake.outcome),
          "Cannot lend: the connection was disposed of",
        );
      };
      await block();
      await lazy.run(async () => {
        await block();
        await block();
        return await lazy.get();
      });
    });
  }
});

test("LazyConnection.connect() replaces the methods of disposal until closing starts", async (t) => {
  class Sync {
    calls: string[] = [];
    [Symbol.dispose]() {
      this.calls.push("dispose");
    }
  }
  class Async {
    calls: string[] = [];
    [Symbol.asyncDispose]() {
      this.calls.push("asyncDispose");
      return Promise.resolve();
    }
  }
  class Both extends Sync {
    [Symbol.asyncDispose] = Async.prototype[Symbol.asyncDispose];
  }
  for (const make of [Sync, Async, Both]) {
    await t.step(make.name, async () => {
      const object = new make() as Partial<Both> & { calls: string[] };
      const { [Symbol.dispose]: dispose, [Symbol.asyncDispose]: asyncDispose } =
        object;
      const own = () => {
        assertStrictEquals(object[Symbol.dispose], dispose);
        if (!asyncDispose) return;
        assertStrictEquals(object[Symbol.asyncDispose], asyncDispose);
      };
      // One of the two it has
      const lazy = new LazyConnection<AsyncDisposable>(async (lend) => {
        await lend(object as AsyncDisposable).finally(own);
      });
      for (let i = 0; i < 2; i++) { // a pool may give it again
        const conn = await lazy.connect();
        assertStrictEquals<unknown>(conn, object);
        assertNotStrictEquals(object[Symbol.asyncDispose], asyncDispose);
        if (dispose) assertNotStrictEquals(object[Symbol.dispose], dispose);
        else assert(!(Symbol.dispose in object));
        const closing = conn[Symbol.asyncDispose]();
        own();
        await closing;
      }
      assertEquals(object.calls, []); // it is for the opener to close
      await object[Symbol.asyncDispose]!(); // as one that it lacked does, too
      assertEquals(object.calls, [asyncDispose ? "asyncDispose" : "dispose"]);
    });
  }
});

test("LazyConnection.connect() rejects an object that a block cannot dispose of, and has it closed", async (t) => {
  const objects: Record<string, object> = {
    "without a method": new Date(),
    "frozen": Object.freeze(new Fake()),
    "that takes no further method": Object.preventExtensions({
      [Symbol.dispose]() {},
    }),
  };
  for (const [name, object] of Object.entries(objects)) {
    await t.step(name, async () => {
      let closed = 0;
      const before = Object.getOwnPropertyDescriptors(object);
      // That is what the types forbid
      const lazy = new LazyConnection<Fake>(async (lend) => {
        try {
          await lend(object as Fake);
        } finally {
          await settled();
          closed++;
        }
      });
      for (const calls of [1, 2]) {
        await assertRejects(() => lazy.connect(), TypeError);
        assertEquals(closed, calls);
      }
      assertEquals(Object.getOwnPropertyDescriptors(object), before);
      await lazy.run(async () => assertStrictEquals(await lazy.get(), object));
    });
  }
});

// Closing

test("LazyConnection.connect() gives `await using` what fails in closing, and nothing else", async (t) => {
  const [a, b] = [new Error("a"), new Error("b")];
  const both = (error: unknown, suppressed: unknown) =>
    new SuppressedError(error, suppressed);
  const cases: Record<string, (left: unknown) => unknown> = {
    "nothing": () => undefined,
    "why it was left": (left) => left,
    "what wraps that": (left) => new Error("wrapped", { cause: left }),
    "closing": () => a,
    "closing, with why it was left": (left) => both(a, left),
    "closing, with what wraps it": (left) =>
      both(a, new Error("wrapped", { cause: left })),
    "closing twice": (left) => both(b, both(a, left)),
  };
  const expected = [undefined, undefined, undefined, a, a, a, both(b, a)];
  for (const [i, [name, fail]] of Object.entries(cases).entries()) {
    await t.step(name, async () => {
      const lazy = new LazyConnection<Fake>(async (lend) => {
        const left = await lend(new Fake()).catch((error) => error);
        await settled();
        const error = fail(left);
        if (error) throw error;
      });
      let got: unknown;
      await lazy.run(async () => { // it may go on to succeed
        try {
          await using _conn = await lazy.connect();
        } catch (error) {
          got = error;
        }
      });
      if (i < 6) return assertStrictEquals(got, expected[i]);
      assertBoth(got, a, b);
    });
  }
});

test("LazyConnection.connect() fails the task with what fails after `using`", async () => {
  const errors = [new Error("first"), new Error("second")];
  const rest = errors.values();
  const fakes: Fake[] = [];
  const lazy = new LazyConnection<Fake>(async (lend) => {
    await opener((fake) => lend(fakes[fakes.push(fake) - 1]!)).catch(() => {});
    const { value: error } = rest.next();
    if (error) throw error;
  });
  const run = lazy.run(async () => {
    for (let i = 0; i < 2; i++) {
      using _conn = await lazy.connect();
    }
    await lazy.get();
  });
  const error = await reasonOf(run);
  assertBoth(error, errors[0], errors[1]);
  assertStrictEquals(fakes[2]!.outcome, error); // it must not commit
});

test("LazyConnection.connect() fails the task with its own error and what fails after `using`", async () => {
  const { lazy, calls } = driven();
  const [task, closing] = [new Error("task"), new Error("closing")];
  const run = lazy.run(async () => {
    const connect = lazy.connect();
    calls[0]!.lend(new Fake());
    using _conn = await connect;
    throw task;
  });
  assert(await isPending(run));
  calls[0]!.reject(closing);
  assertBoth(await reasonOf(run), task, closing);
});

test("LazyConnection.connect() closes once, and a later disposal does nothing", async () => {
  const { lazy, calls } = driven();
  const connect = lazy.connect();
  calls[0]!.lend(new Fake());
  const conn = await connect;
  const { [Symbol.dispose]: dispose, [Symbol.asyncDispose]: asyncDispose } =
    conn;
  const first = asyncDispose();
  dispose();
  await asyncDispose(); // it does not wait for the first one
  assert(await isPending(first));

  const next = lazy.connect();
  calls[0]!.resolve();
  await first;
  await settled();
  calls[1]!.lend(conn); // the same object, from a pool
  dispose();
  await asyncDispose();
  assertStrictEquals(lazy.current, await next);
});

test("LazyConnection.run() waits for what nobody waits for to be closed", async () => {
  for (const key of [Symbol.dispose, Symbol.asyncDispose] as const) {
    const { lazy, calls } = driven();
    const run = lazy.run(async () => {
      const connect = lazy.connect();
      calls[0]!.lend(new Fake());
      (await connect)[key]();
      if (key === Symbol.dispose) lazy.get(); // waits, and is cancelled
    });
    assert(await isPending(run));
    calls[0]!.resolve();
    await run;
    assertEquals(calls.length, 1);
  }
});

test("LazyConnection lets a pool hand an object on from within closing", async (t) => {
  const ways: Record<string, (release: () => void) => unknown> = {
    "at once": (release) => release(),
    "later": (release) => settled().then(release),
    "while closing goes on": (release) => {
      release();
      return settled();
    },
  };
  for (const [name, way] of Object.entries(ways)) {
    await t.step(name, async () => {
      const pooled = new Fake();
      let free: Fake | undefined = pooled;
      const waiting: ((fake: Fake) => void)[] = [];
      const lazy = new LazyConnection<Fake>(async (lend) => {
        const fake = free ?? await new Promise<Fake>((resolve) => {
          waiting.push(resolve);
        });
        free = undefined;
        try {
          await lend(fake);
        } finally {
          await way(() => {
            const next = waiting.shift();
            if (next) next(fake);
            else free = fake;
          });
        }
      });
      const block = async () => {
        await using _conn = await lazy.connect();
      };
      const get = async () => void await lazy.get();
      await Promise.all([block, get, get, block].map((fn) => lazy.run(fn)));
      assertStrictEquals(free, pooled);
    });
  }
});

// The opener: lend()

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

test("lend() rejects another task's connection, as do get() and connect()", async () => {
  const shared = new Fake();
  const lazy = new LazyConnection<Fake>((lend) => lend(shared));
  const savepoint = new LazyConnection<Fake>((lend) => lend(shared));
  const swallowing: Opener<Fake> = (lend) => lend(shared).catch(() => {});
  const message = "Cannot lend: another task has this connection";
  await lazy.run(async () => {
    const fake = await lazy.get();
    await lazy.run(async () => {
      await assertRejects(() => lazy.get(), Busy, message);
      await assertRejects(() => lazy.connect(), Busy, message);
    });
    assertEquals(Reflect.ownKeys(shared), ["outcome"]);
    assertStrictEquals(lazy.current, fake);
    await savepoint.run(() => savepoint.get());
    assertStrictEquals(lazy.current, fake);
  });
  await lazy.run(() => lazy.get()); // it is free again
  const swallow = new LazyConnection<Fake>(swallowing);
  await swallow.run(async () => {
    await swallow.get();
    await assertRejects(() => swallow.run(() => swallow.get()), TypeError);
  });
});

test("lend() may be handed on", async () => {
  const transaction = async <T>(fn: (fake: Fake) => Promise<T>): Promise<T> => {
    const fake = new Fake();
    const result = await fn(fake);
    fake.outcome = "committed";
    return result;
  };
  const lazy = new LazyConnection<Fake>((lend) => transaction(lend));
  const fake = await lazy.run(() => lazy.get());
  assertEquals(fake.outcome, "committed");
});

test("LazyConnection lets an opener start a task of its own", async () => {
  let depth = 0;
  const lazy: LazyConnection<Fake> = new LazyConnection<Fake>(async (lend) => {
    if (++depth < 3) await lazy.run(() => lazy.get());
    await opener(lend);
  });
  const fake = await lazy.run(() => lazy.get());
  assertEquals([depth, fake.outcome], [3, "committed"]);
});

// The opener: over before its task

test("LazyConnection.run() fails if the opener is over before the task", async (t) => {
  const error = new Error("server gone");
  const task = new Error("task");
  const wrapped = new Error("wrapped", { cause: error });
  const cases: Record<string, [F: unknown, E: unknown, got: unknown]> = {
    "by rejecting": [error, undefined, error],
    "by resolving": [undefined, undefined, TypeError],
    "and the task with its error": [error, error, error],
    "and the task with what carries its error": [error, wrapped, wrapped],
    "and the task with another error": [error, task, SuppressedError],
  };
  for (const [name, [F, E, got]] of Object.entries(cases)) {
    await t.step(name, async () => {
      const { lazy, calls } = driven();
      let lent: Promise<void> | undefined;
      const run = lazy.run(async () => {
        const get = lazy.get();
        lent = calls[0]!.lend(new Fake());
        await get;
        if (F) calls[0]!.reject(F);
        else calls[0]!.resolve();
        await settled();
        assertEquals(lazy.current, undefined);
        const reason = await reasonOf(lazy.get());
        assertStrictEquals(await reasonOf(lazy.connect()), reason);
        assertStrictEquals(await reasonOf(lent!), reason);
        if (F) assertStrictEquals(reason, F);
        else assertStrictEquals((reason as Error).message, OVER);
        assertEquals(calls.length, 1);
        if (E) throw E;
      });
      const reason = await reasonOf(run);
      if (got === SuppressedError) assertBoth(reason, E, F);
      else if (typeof got === "object") assertStrictEquals(reason, got);
      else assertInstanceOf(reason, TypeError);
    });
  }
});

test("LazyConnection.connect() gives the block the error of an opener that is over, and frees the task", async () => {
  const error = new Error("server gone");
  for (const key of [Symbol.dispose, Symbol.asyncDispose] as const) {
    const { lazy, calls } = driven();
    const block = async () => {
      const connect = lazy.connect();
      const [call] = calls.splice(0);
      call!.lend(new Fake());
      const { [key]: dispose } = await connect;
      call!.reject(error);
      await settled();
      assertStrictEquals(await reasonOf(lazy.connect()), error);
      assertStrictEquals(
        await reasonOf((async () => await dispose())()),
        error,
      );
      await dispose(); // only once
      lazy.connect();
      assertEquals(calls.length, 1);
    };
    await lazy.run(block);
    calls.length = 0;
    await block();
    lazy[Symbol.asyncDispose]();
  }
});

// Cancelling

test("LazyConnection.connect() rejects at once when its signal aborts, whatever the opener does", async () => {
  for (const reason of [new Error("enough"), "enough", null, 0]) {
    const { lazy, calls } = driven();
    const controller = new AbortController();
    const attempts: Promise<Fake>[] = [lazy.connect(controller)];
    await lazy.run(async () => {
      attempts.push(lazy.connect(controller), lazy.get());
      controller.abort(reason);
      for (const attempt of attempts) {
        assertStrictEquals(await reasonOf(attempt), reason);
      }
      // The task is free, while the earlier opener goes on
      const get = lazy.get();
      calls[2]!.lend(new Fake()).then(calls[2]!.resolve);
      const fake = await get;
      assertStrictEquals(await reasonOf(calls[1]!.lend(new Fake())), reason);
      assertStrictEquals(calls[1]!.signal.reason, reason);
      assertStrictEquals(lazy.current, fake);
    });
    calls[0]!.reject(new Error("late"));
  }
});

test("LazyConnection.connect() does not start with an aborted or invalid signal", async () => {
  const { lazy, calls } = driven();
  const reason = { own: "reason" };
  const signal = AbortSignal.abort(reason);
  assertStrictEquals(await reasonOf(lazy.connect({ signal })), reason);
  const invalid = { aborted: false } as AbortSignal; // a polyfill's, say
  await assertRejects(() => lazy.connect({ signal: invalid }), TypeError);
  assertEquals(calls.length, 0);
  const connect = lazy.connect({ signal: undefined });
  calls[0]!.lend(new Fake());
  await connect;
});

test("LazyConnection.connect() rejects in time with AbortSignal.timeout()", async () => {
  const { lazy } = driven();
  const connect = lazy.connect({ signal: AbortSignal.timeout(5) });
  const error = await assertRejects(() => connect, DOMException);
  assertEquals(error.name, "TimeoutError");
});

test("LazyConnection heeds the signal of the options besides its own", async () => {
  using _stub = stubConnect(() => new Promise(() => {})); // never answers
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

test("LazyConnection.connect() is not concerned by the signal of an earlier attempt", async () => {
  const { lazy, calls } = driven();
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  calls[0]!.lend(new Fake());
  (await connect)[Symbol.dispose]();
  const next = lazy.connect(); // waits for the earlier one to be closed
  controller.abort();
  await assertRejects(() => lazy.connect(), AlreadyExists);
  calls[0]!.resolve();
  await settled();
  calls[1]!.lend(new Fake());
  assertStrictEquals(await next, lazy.current);
});

test("LazyConnection is not concerned by an opener that was cancelled and goes on", async () => {
  const { lazy, calls } = driven();
  const error = new Error("server gone");
  const cancelled = async () => {
    const controller = new AbortController();
    const connect = reasonOf(lazy.connect(controller));
    controller.abort(error);
    assertStrictEquals(await connect, error);
  };
  const run = lazy.run(async () => {
    await cancelled();
    const connect = lazy.connect();
    calls[1]!.lend(new Fake());
    const closing = (await connect)[Symbol.asyncDispose]();
    calls[0]!.resolve();
    await settled();
    const get = lazy.get();
    await settled();
    assertEquals(calls.length, 2); // the one before it is still closing
    calls[1]!.resolve();
    await closing;
    await settled();
    calls[2]!.reject(error);
    assertStrictEquals(await reasonOf(get), error);
    await cancelled();

    const lost = lazy.get();
    calls[4]!.lend(new Fake());
    await lost;
    calls[4]!.reject(error);
    await settled();
    const disposal = lazy[Symbol.asyncDispose]();
    calls[3]!.resolve();
    await disposal;
  });
  assertStrictEquals(await reasonOf(run), error);
});

test("LazyConnection never aborts the opener's signal once it has lent", async () => {
  const { lazy, calls } = driven();
  const controller = new AbortController();
  await lazy.run(async () => {
    const connect = lazy.connect(controller);
    calls[0]!.lend(new Fake()).catch(() => {});
    const conn = await connect;
    controller.abort();
    await settled();
    assertStrictEquals(lazy.current, conn);
    const closing = conn[Symbol.asyncDispose]();
    const disposal = lazy[Symbol.asyncDispose]();
    calls[0]!.resolve();
    await Promise.all([closing, disposal]);
  });
  assertEquals(calls[0]!.signal.aborted, false);
});

test("LazyConnection never aborts the signal of an opener that has failed", async () => {
  const { lazy, calls } = driven();
  const controller = new AbortController();
  const connect = lazy.connect(controller);
  calls[0]!.reject(new Error("opener"));
  await assertRejects(() => connect, Error, "opener");
  controller.abort();
  await lazy[Symbol.asyncDispose]();
  assertEquals(calls[0]!.signal.aborted, false);
  await assertRejects(() => calls[0]!.lend(new Fake()), Error, "opener");
});

test("LazyConnection.connect() adds no listener to a signal that attempts share", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  let listeners = 0;
  signal.addEventListener = () => listeners++;
  const { lazy } = driven();
  const attempts = Array.from(
    { length: 100 },
    () => reasonOf(lazy.run(() => lazy.connect({ signal }))),
  );
  controller.abort("enough");
  assertEquals(await Promise.all(attempts), Array(100).fill("enough"));
  assertEquals(listeners, 0);
});

test("LazyConnection.connect() stops listening to its signal once the opener is over", async () => {
  const { any } = AbortSignal;
  let listeners = 0;
  using _stub = {
    [Symbol.dispose]: () => AbortSignal.any = any,
  };
  AbortSignal.any = (signals) => {
    const signal = any.call(AbortSignal, signals);
    signal.addEventListener = () => listeners++;
    signal.removeEventListener = (type: string) => {
      assertEquals(type, "abort");
      listeners--;
    };
    return signal;
  };
  const { lazy, calls } = driven();
  const connect = lazy.connect(new AbortController());
  assertEquals(listeners, 1);
  calls[0]!.reject(new Error("opener"));
  await assertRejects(() => connect, Error, "opener");
  assertEquals(listeners, 0);
});

test("LazyConnection does not call the opener for an attempt that was cancelled while it waited", async (t) => {
  const ways: Record<string, (way: Way) => unknown> = {
    "by its signal": ({ controller }) => controller.abort(new Error("enough")),
    "by the end of the task": ({ end }) => end.resolve(),
    "by disposal": ({ lazy }) => lazy[Symbol.asyncDispose](),
  };
  type Way = {
    lazy: LazyConnection<Fake>;
    controller: AbortController;
    end: PromiseWithResolvers<void>;
  };
  for (const [name, cancel] of Object.entries(ways)) {
    await t.step(name, async () => {
      const { lazy, calls } = driven();
      const controller = new AbortController();
      const end = Promise.withResolvers<void>();
      let waiting: Promise<unknown> | undefined;
      const run = lazy.run(async () => {
        const connect = lazy.connect();
        calls[0]!.lend(new Fake());
        (await connect)[Symbol.dispose]();
        waiting = reasonOf(lazy.connect(controller));
        await end.promise;
      });
      await settled();
      const cancelled = cancel({ lazy, controller, end });
      assertInstanceOf(await waiting, Error);
      calls[0]!.resolve();
      end.resolve();
      await Promise.all([run, cancelled]);
      assertEquals(calls.length, 1);
    });
  }
});

test("LazyConnection keeps its promises whenever an attempt ends", async (t) => {
  type Way = {
    lazy: LazyConnection<Fake>;
    controller: AbortController;
    end: PromiseWithResolvers<void>;
  };
  const ways: Record<string, (way: Way) => unknown> = {
    "by its signal": ({ controller }) => controller.abort("enough"),
    "by the end of the task": ({ end }) => end.resolve(),
    "by disposal": ({ lazy }) => lazy[Symbol.asyncDispose](),
  };
  for (const [name, finish] of Object.entries(ways)) {
    await t.step(name, async () => {
      for (let ticks = 0; ticks < 20; ticks++) {
        const fakes: Fake[] = [];
        let signal: AbortSignal | undefined;
        const lazy = new LazyConnection<Fake>(async (lend, given) => {
          signal = given;
          await settled(5);
          await opener((fake) => lend(fakes[fakes.push(fake) - 1]!));
        });
        const controller = new AbortController();
        const end = Promise.withResolvers<void>();
        let attempts: Promise<Fake>[] = [];
        const run = lazy.run(async () => {
          attempts = [lazy.connect(controller), lazy.get()];
          await end.promise;
        });
        run.catch(() => {});
        await settled(ticks);
        const finished = finish({ lazy, controller, end });
        await settled();
        end.resolve();
        const [ran] = await Promise.allSettled([run]);
        const [connect, get] = await Promise.allSettled(attempts);
        await finished;
        const at = `after ${ticks} microtasks`;
        assertEquals(get, connect, at);
        assertEquals(signal!.aborted, connect!.status === "rejected", at);
        const [fake] = fakes;
        const committed = fake!.outcome === "committed";
        if (connect!.status === "rejected") {
          assertStrictEquals(fake!.outcome, connect!.reason, at);
        } else assertEquals(committed, ran.status === "fulfilled", at);
      }
    });
  }
});

// [Symbol.asyncDispose]()

test("LazyConnection[Symbol.asyncDispose]() closes and cancels everything, and waits for it", async () => {
  const { lazy, calls } = driven();
  const end = Promise.withResolvers<void>();
  const task = async (ask: "get" | "connect") => {
    await lazy[ask]();
    await end.promise;
  };
  const main = lazy.connect();
  const runs = ["get", "connect"].map((ask) =>
    reasonOf(lazy.run(task, ask as "get" | "connect"))
  );
  const idle = lazy.run(() => end.promise);
  const opening = lazy.run(() => lazy.get());
  const floating = lazy.run(async () => {
    lazy.get(); // nobody awaits it, and the process goes on
    await end.promise;
  });
  const lent = calls.slice(0, 3).map(({ lend }) => lend(new Fake()));
  await main;

  const disposal = lazy[Symbol.asyncDispose]();
  const again = lazy[Symbol.asyncDispose]();
  for (const promise of [...lent, opening]) {
    await assertRejects(() => promise, BadResource, DISPOSED);
  }
  assertEquals(lazy.current, undefined);
  await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  let started = false;
  const late = lazy.run(() => started = true);
  await assertRejects(() => late, BadResource, DISPOSED);
  assertEquals(started, false);
  for (const { lend, signal } of calls.slice(3)) {
    assertStrictEquals(await reasonOf(lend(new Fake())), signal.reason);
  }
  end.resolve();
  await Promise.all([idle, floating]); // they had no connection
  for (const { resolve } of calls) {
    assert(await isPending(disposal));
    assert(await isPending(again));
    resolve();
  }
  await Promise.all([disposal, again]);
  for (const run of runs) {
    assertInstanceOf(await run, BadResource);
  }
});

test("LazyConnection[Symbol.asyncDispose]() refuses a task that is going on", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  await lazy.run(async () => {
    await lazy[Symbol.asyncDispose]();
    await assertRejects(() => lazy.get(), BadResource, DISPOSED);
    await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
    assertEquals(await lazy.runOrJoin(() => 1), 1);
  });
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
  assertStrictEquals(await reasonOf(run), error); // who has been told
  await disposal;
});

test("LazyConnection[Symbol.asyncDispose]() reports every error of closing", async () => {
  const { lazy, calls } = driven();
  const errors = ["a", "b", "c"].map((name) => new Error(name));
  const controller = new AbortController();
  const attempts = [
    lazy.run(() => lazy.connect(controller)),
    ...errors.map(() => lazy.run(() => lazy.get().then(() => delay(2)))),
  ];
  const rejected = Promise.allSettled(attempts);
  controller.abort(new Error("enough"));
  await settled();
  const lent = calls.slice(2).map(({ lend }) => lend(new Fake()));
  await settled();
  const disposal = lazy[Symbol.asyncDispose]();
  calls[0]!.reject(new SuppressedError(errors[0], controller.signal.reason));
  calls[1]!.reject(errors[1]);
  calls[2]!.reject(errors[2]);
  await delay(1); // no error goes unhandled for as long as another one closes
  calls[3]!.reject(new Error("wrapped", { cause: await reasonOf(lent[1]!) }));
  const outer = await assertRejects(() => disposal, SuppressedError);
  const inner = outer.suppressed as SuppressedError;
  const reported = [inner.suppressed, inner.error, outer.error];
  assertEquals(new Set(reported), new Set(errors));
  await rejected;
});

test("LazyConnection[Symbol.asyncDispose]() reports what failed in the main task, and was told to nobody", async (t) => {
  const error = new Error("closing");
  const ways: Record<string, (conn: Disposable) => void> = {
    "after `using`": (conn) => conn[Symbol.dispose](),
    "before the block is left": () => {},
  };
  for (const [name, leave] of Object.entries(ways)) {
    for (const early of [true, false]) {
      await t.step(`${name}, ${early}`, async () => {
        const { lazy, calls } = driven();
        const connect = lazy.connect();
        calls[0]!.lend(new Fake());
        leave(await connect);
        if (early) calls[0]!.reject(error);
        if (early) await settled();
        const disposal = reasonOf(lazy[Symbol.asyncDispose]());
        calls[0]!.reject(error);
        assertStrictEquals(await disposal, error);
        await lazy[Symbol.asyncDispose](); // which has been told
      });
    }
  }
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
  await assertRejects(() => lazy.connect(), BadResource, DISPOSED);
  await disposal;
  assert(closed);
});

test("LazyConnection[Symbol.asyncDispose]() has nothing to do with tasks that are over", async () => {
  const lazy = new LazyConnection<Fake>(opener);
  for (let i = 0; i < 1_000; i++) await lazy.run(() => lazy.get());
  // It would take longer to wait for a thousand, one by one
  assert(!await isPending(lazy[Symbol.asyncDispose]()));
});

// revocable()

test("revocable() lends what works until lend() settles", async () => {
  class Client {
    #sql: string[] = []; // which no proxy has
    get sent() {
      return this.#sql;
    }
    query(sql: string) {
      this.#sql.push(sql);
    }
  }
  for (const error of [undefined, new Error("task")]) {
    const client = new Client();
    let lent: Client | undefined;
    const late: (() => void)[] = [];
    const transaction = async (fn: (client: Client) => Promise<void>) => {
      await fn(client).finally(() => {
        for (const call of late) assertThrows(call, TypeError);
        client.query("end");
      });
    };
    const lazy = new LazyConnection<Client>((lend) =>
      transaction(revocable(lend))
    );
    const run = lazy.run(async () => {
      lent = await lazy.get();
      const { query } = lent;
      late.push(() => lent!.query("late"), () => query.call(lent, "late"));
      late.push(() => query.call(client, "late"), () => lent!.sent);
      lent.query("in time");
      assertEquals(lent.sent, ["in time"]);
      query.call(new Client(), "to another");
      assertStrictEquals(lazy.current, lent);
      if (error) throw error;
    });
    assertStrictEquals(await run.catch((error) => error), error);
    assertEquals(client.sent, ["in time", "end"]);
  }
});

test("revocable() works for a function, and in a block", async () => {
  const sql = Object.assign((text: TemplateStringsArray) => text[0], {
    typed: Object.assign(() => "typed", { date: () => "date" }),
    [Symbol.dispose]() {},
  });
  const { [Symbol.dispose]: dispose } = sql;
  const lazy = new LazyConnection<typeof sql>((lend) => revocable(lend)(sql));
  const conn = await lazy.connect();
  assertEquals(conn`SELECT 1`, "SELECT 1");
  assertEquals([conn.typed(), conn.typed.date()], ["typed", "date"]);
  await conn[Symbol.asyncDispose]();
  assertThrows(() => conn`SELECT 2`, TypeError);
  assertStrictEquals(sql[Symbol.dispose], dispose);
});

test("revocable() lends a frozen object, and rejects as quietly as lend()", async () => {
  const client = Object.freeze({ query: () => "row" });
  const error = new Error("task");
  const lazy = new LazyConnection<typeof client>(async (lend) => {
    revocable(lend)(client); // nobody awaits it, and the process goes on
    await settled();
  });
  const run = lazy.run(async () => {
    const lent = await lazy.get();
    assertEquals(lent.query(), "row");
    throw error;
  });
  assertStrictEquals(await reasonOf(run), error);
});

// Sockets

const loopback = { hostname: "127.0.0.1", port: 0 };

function netTest(name: string, fn: (t: Deno.TestContext) => Promise<void>) {
  const net = Deno.permissions.querySync({ name: "net", host: "127.0.0.1" });
  if (net.state === "granted") test(name, fn);
  else Deno.test.ignore(name, fn);
}

netTest(
  "LazyConnection opens a TcpConn for each task, and closes it",
  async () => {
    using listener = Deno.listen(loopback);
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
        await using conn = await lazy.connect();
        conn.close();
        await assertRejects(() => lazy.connect(), AlreadyExists);
        return conn;
      },
      "the end of the task": () => lazy.run(() => lazy.get()),
    };
    const ports = new Set<number>();
    for (const way of Object.values(ways)) {
      const conn = await way();
      ports.add(conn.localAddr.port);
      using server = await listener.accept();
      assertEquals(await server.read(new Uint8Array(1)), null);
      await assertRejects(() => conn.write(new Uint8Array(1)), BadResource);
    }
    assertEquals(ports.size, 4);
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
    assertEquals(await reasonOf(connect), "enough");
    await lazy[Symbol.asyncDispose]();
  },
);

netTest(
  "LazyConnection closes a socket that opened as its signal aborted",
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
    assertEquals(await reasonOf(lazy.connect(controller)), "enough");
    await lazy[Symbol.asyncDispose]();
    await assertRejects(() => conn!.write(new Uint8Array(1)), BadResource);
  },
);

netTest(
  "LazyConnection holds a thousand tasks' connections at once",
  async () => {
    using listener = Deno.listen(loopback);
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

// The demo

netTest(
  "demo shows two connections at once, and what else a LazyConnection does",
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
      "a task that succeeds: BEGIN, INSERT, COMMIT",
      "a task that fails: BEGIN, INSERT, ROLLBACK",
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
  const read = async (conn: Deno.Conn) => {
    const buffer = new Uint8Array(1_000);
    const length = await conn.read(buffer) ?? 0;
    return new TextDecoder().decode(buffer.subarray(0, length));
  };
  const conns = [await listener.accept()];
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
  assertEquals(lines.slice(3).sort(), [`task 1${got}`, `task 2${got}`]);
});

test("demo says in one line what is wrong", async () => {
  const usage = "Cannot run the demo: give HOST and PORT, or nothing";
  for (const args of [["127.0.0.1"], ["127.0.0.1", "80", "90"], ["", "80"]]) {
    await assertRejects(() => main(args, () => {}), TypeError, usage);
  }
  for (const reason of [new Error("no"), "no"]) {
    using _stub = stubConnect(({ port }) => {
      assertEquals(port, 80);
      return Promise.reject(reason);
    });
    const error = await reasonOf(main(["127.0.0.1", "80"], () => {}));
    assertEquals(String(error), "Error: Cannot fetch from 127.0.0.1:80: no");
    assertStrictEquals((error as Error).cause, reason);
  }
});

/** Has `Deno.connect` replaced until the end of the block. */
function stubConnect(
  connect: (options: Deno.ConnectOptions) => Promise<Deno.TcpConn>,
): Disposable {
  const original = Deno.connect;
  // It has overloads that no arrow function has
  Deno.connect = connect as typeof Deno.connect;
  return { [Symbol.dispose]: () => Deno.connect = original };
}

/** A function that throws. */
function throws(error: unknown): () => never {
  return () => {
    throw error;
  };
}
