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
import { assert, assertEquals } from "@std/assert";
import { LazyConnection } from "../mod.ts";

/** Chance, the same one for the same seed. */
class Chance {
  constructor(public seed: number) {}

  /** A number from 0 up to but not including `n`. */
  pick(n: number): number { // mulberry32
    this.seed = (this.seed + 0x6D2B79F5) | 0;
    let t = Math.imul(this.seed ^ (this.seed >>> 15), this.seed | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % n;
  }

  oneIn(n: number): boolean {
    return this.pick(n) === 0;
  }

  async ticks(): Promise<void> {
    for (let i = this.pick(12); i > 0; i--) await null;
  }
}

/** A transaction, on a connection that a pool gives again and again. */
class Transaction {
  rows: object[] = [];
  insert(row: object) {
    this.rows.push(row);
  }
}

class Task {
  inserted = 0;
  /** Whether a part of it has failed. */
  failed = false;
  resolved = false;
  /** Whether it resolved although a part had failed before its end. */
  halved = false;
}

/** The rows of a task are stored if and only if its `run()` resolves. */
async function transactions(chance: Chance): Promise<void> {
  const pool: Transaction[] = [];
  const stored: object[] = [];
  const tasks: Task[] = [];
  let openers = 0;

  const lazy = new LazyConnection<Transaction>(async (lend, signal) => {
    openers++;
    const transaction = pool.pop() ?? new Transaction();
    try {
      await chance.ticks();
      if (chance.oneIn(8)) throw new Error("opening");
      if (chance.oneIn(2)) signal.throwIfAborted(); // half of them heed it
      if (chance.oneIn(10)) { // is over, perhaps before its task
        lend(new Transaction());
        await chance.ticks();
        throw new Error("over");
      }
      await lend(transaction);
      await chance.ticks();
      if (chance.oneIn(8)) throw new Error("COMMIT");
      stored.push(...transaction.rows);
    } finally {
      transaction.rows = [];
      pool.push(transaction);
      await chance.ticks();
      openers--;
    }
  });

  /** Does something as a part of a task. */
  async function step(task: Task, depth: number): Promise<void> {
    await chance.ticks();
    const way = chance.pick(5);
    if (way === 0) {
      lazy.get(); // nobody awaits it
      if (chance.oneIn(2)) throw new Error("task");
    } else if (way === 1) {
      await lazy.runOrJoin(() => step(task, depth)).catch((error) => {
        task.failed = true;
        throw error;
      });
    } else if (way === 2 && depth < 2) {
      await start(depth + 1);
    } else {
      const transaction = await lazy.get();
      await chance.ticks();
      transaction.insert(task);
      task.inserted++;
    }
  }

  /** Runs a task of several branches, which may outlive it. */
  async function start(depth = 0): Promise<void> {
    const task = tasks[tasks.push(new Task()) - 1]!;
    const branch = () =>
      step(task, depth).catch((error) => {
        if (chance.oneIn(2)) throw error;
      });
    const run = lazy.run(async () => {
      await Promise.all(Array.from({ length: 1 + chance.pick(3) }, branch));
      return task.failed;
    });
    task.halved = await run;
    task.resolved = true;
  }

  const settled = Promise.allSettled([start(), start(), start()]);
  if (chance.oneIn(2)) await settled;
  else for (let i = 0; i < 5; i++) await chance.ticks();
  await lazy[Symbol.asyncDispose]();
  assertEquals(openers, 0);
  await settled;
  for (let i = 0; i < 50; i++) await null; // branches that outlive their tasks
  for (const task of tasks) {
    const rows = stored.filter((row) => row === task).length;
    assertEquals(rows, task.resolved ? task.inserted : 0);
    assert(!task.halved);
  }
}

/** A task never has two sockets, and all that open are closed. */
async function sockets(chance: Chance): Promise<void> {
  const open = new Set<object>();
  const broken: string[] = [];
  let disposed = false;
  const connect = async () => {
    await chance.ticks();
    if (chance.oneIn(8)) throw new Error("refused");
    const socket = { [Symbol.dispose]: () => open.delete(socket) };
    open.add(socket);
    return socket;
  };
  // It has overloads that no arrow function has
  Deno.connect = connect as object as typeof Deno.connect;
  const lazy = new LazyConnection({ port: 1 });

  /** Disposes of a socket by `using`, however it asked for it. */
  async function block(): Promise<void> {
    const controller = new AbortController();
    chance.ticks().then(() => controller.abort("enough"));
    const options = chance.oneIn(3) ? controller : {};
    using conn = await (chance.oneIn(2) ? lazy.connect(options) : lazy.get());
    await chance.ticks();
    if (disposed) return;
    if (lazy.current !== conn) broken.push("the task has another socket");
    if (!open.has(conn)) broken.push("the task's socket is closed");
  }

  async function task(): Promise<void> {
    for (let i = chance.pick(4); i > 0; i--) {
      await block().catch(() => {});
      if (chance.oneIn(3)) lazy.run(task).catch(() => {});
    }
    if (chance.oneIn(2)) lazy.connect().catch(() => {}); // is cancelled
  }

  const settled = Promise.allSettled([lazy.run(task), lazy.run(task), task()]);
  if (chance.oneIn(2)) await settled;
  else for (let i = 0; i < 5; i++) await chance.ticks();
  disposed = true;
  await lazy[Symbol.asyncDispose]();
  assertEquals(open.size, 0);
  await settled;
  assertEquals(broken, []);
}

for (const schedule of [transactions, sockets]) {
  Deno.test(`LazyConnection keeps its promises whatever the schedule of ${schedule.name}`, async () => {
    const { connect } = Deno;
    const [given] = Deno.args;
    const first = given === undefined ? Date.now() % 1e9 : Number(given);
    const count = given === undefined ? 300 : 1;
    for (let seed = first; seed < first + count; seed++) {
      try {
        await schedule(new Chance(seed));
      } catch (cause) {
        const message = `Replay with deno task test -- ${seed}`;
        throw new Error(message, { cause });
      } finally {
        Deno.connect = connect;
      }
    }
  });
}
