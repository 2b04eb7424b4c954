// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Runs random tasks, and checks what must hold whatever the schedule.
 *
 * ```sh
 * deno task test            # other schedules each time
 * deno task test -- SEED    # one of them again
 * ```
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { assertEquals } from "@std/assert";
import { LazyConnection } from "../mod.ts";

/** Numbers from 0 up to but not including `n`, the same ones for the same seed. */
function random(seed: number): (n: number) => number {
  return (n) => { // mulberry32
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % n;
  };
}

/** A connection, and what its opener saw of it. */
class Connection implements Disposable {
  /** By what a block left it, if one did. */
  left: "using" | "await using" | undefined;
  outcome: "never lent" | "lent" | "over early" | "committed" | "rolled back" =
    "never lent";
  /** Whether a block was told what the opener failed with. */
  told = false;
  [Symbol.dispose]() {}
}

/** What is known of a task, without asking the `LazyConnection`. */
class Task {
  ended = false;
  readonly connections: Connection[] = [];
  /** What must fail it, even if its function succeeds. */
  readonly reasons: string[] = [];
}

async function schedule(seed: number): Promise<void> {
  const pick = random(seed);
  const oneIn = (n: number) => pick(n) === 0;
  const tasks = new AsyncLocalStorage<Task>();
  /** Those that are not over. */
  let openers = 0;
  const broken: string[] = [];

  function check(holds: boolean, promise: string) {
    if (!holds) broken.push(promise);
  }

  async function ticks(): Promise<void> {
    for (let i = pick(12); i > 0; i--) await null;
  }

  const lazy = new LazyConnection<Connection>(async (lend, signal) => {
    const task = tasks.getStore()!;
    openers++;
    try {
      await ticks();
      if (oneIn(8)) throw new Error("opening");
      if (oneIn(2)) signal.throwIfAborted(); // half of them heed it
      await use(task, lend);
    } finally {
      await ticks();
      openers--;
    }
  });

  async function use(
    task: Task,
    lend: (connection: Connection) => Promise<void>,
  ): Promise<void> {
    const connection = new Connection();
    const before = lazy.current;
    const lending = lend(connection);
    if (lazy.current === connection) {
      check(before === undefined, "never two at once");
      connection.outcome = "lent";
      task.connections.push(connection);
    }
    const early = oneIn(10) && ticks();
    const ended = lending.then(() => undefined, (error) => ({ error }));
    const result = await Promise.race(early ? [early, ended] : [ended]);
    if (lazy.current === connection) {
      connection.outcome = "over early";
      throw new Error("over early");
    }
    await ticks();
    const failure = result || await ended;
    const told = connection.left === "await using";
    const wasLent = connection.outcome === "lent";
    if (wasLent) connection.outcome = "rolled back";
    if (oneIn(8)) { // a refused COMMIT, or a failed ROLLBACK
      if (wasLent && !told) task.reasons.push("closing");
      throw new Error("closing");
    }
    if (failure) throw failure.error;
    connection.outcome = "committed";
  }

  /** Does something with the connection of the current task. */
  async function step(depth: number): Promise<void> {
    const task = tasks.getStore()!;
    await ticks();
    const way = pick(6);
    if (way === 0) {
      lazy.get().catch(() => {});
      if (oneIn(2)) throw new Error("task");
    } else if (way === 1) {
      await lazy.get();
    } else if (way === 2) {
      const controller = new AbortController();
      const connect = lazy.connect(controller);
      ticks().then(() => controller.abort(new Error("signal")));
      const connection = await connect;
      await ticks();
      if (lazy.current === connection) connection.left = "await using";
      try {
        await connection[Symbol.asyncDispose]();
      } catch (error) {
        connection.told = true;
        throw error;
      }
    } else if (way === 3) {
      const connection = await lazy.connect();
      await ticks();
      if (lazy.current === connection) connection.left = "using";
      try {
        connection[Symbol.dispose]();
      } catch (error) {
        connection.told = true;
        throw error;
      }
    } else if (way === 4 && !task.ended) {
      try {
        await lazy.runOrJoin(() => step(depth + 1));
      } catch (error) {
        if (!task.ended) task.reasons.push("part");
        throw error;
      }
    } else if (depth < 2) {
      await start(depth + 1);
    }
  }

  /** Runs a task of several branches, of which it may ignore how they end. */
  async function start(depth = 0): Promise<void> {
    const task = new Task();
    const branch = () => oneIn(2) ? step(depth).catch(() => {}) : step(depth);
    const run = tasks.run(task, () =>
      lazy.run(async () => {
        const branches = Array.from({ length: 1 + pick(3) }, branch);
        await Promise.all(branches).finally(() => task.ended = true);
      }));
    const [{ status }] = await Promise.allSettled([run]);
    const committed = status === "fulfilled";
    for (const { outcome, left, told } of task.connections) {
      if (outcome === "over early") check(told || !committed, "over early");
      else if (left) check(outcome === "rolled back", "a block is no success");
      else {check(
          outcome === "committed" === committed,
          "commits if it resolves",
        );}
    }
    check(!committed || task.reasons.length === 0, "fails with what failed");
    await run;
  }

  const roots = Array.from({ length: 3 }, () => start());
  const settled = Promise.allSettled(roots);
  if (oneIn(2)) await settled;
  else for (let i = 0; i < 5; i++) await ticks();
  await lazy[Symbol.asyncDispose]().catch(() => {});
  check(openers === 0, "disposal waits for all openers");
  await settled;
  assertEquals(broken, []);
}

Deno.test("LazyConnection keeps its promises whatever the schedule", async () => {
  const [seed] = Deno.args;
  const first = seed === undefined ? Date.now() % 1e9 : Number(seed);
  const count = seed === undefined ? 300 : 1;
  for (let seed = first; seed < first + count; seed++) {
    try {
      await schedule(seed);
    } catch (cause) {
      const message = `Replay with deno task test -- ${seed}`;
      throw new Error(message, { cause });
    }
  }
});
