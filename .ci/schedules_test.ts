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

/** Lets all promises settle that can. */
async function flush(): Promise<void> {
  for (let i = 0; i < 50; i++) await null;
}

/** A client that a pool gives again and again, and what it has not committed. */
class Client {
  rows: object[] = [];
  insert(row: object) {
    this.rows.push(row);
  }
}

/** What a task did, which is the row that it inserts, and how it went. */
class Log {
  inserted = 0;
  /** How many of its parts are pending. */
  pending = 0;
  /** Whether a part of it has failed. */
  failed = false;
  /** Whether it must not resolve. */
  mustFail = false;
  resolved = false;
}

/** The rows of a task are stored if and only if it resolves. */
async function transactions(chance: Chance): Promise<void> {
  const pool: Client[] = [];
  const stored: object[] = [];
  const logs: Log[] = [];
  let openers = 0;

  const lazy = new LazyConnection<Client>(async (lend, signal) => {
    openers++;
    const client = pool.pop() ?? new Client();
    try {
      await chance.ticks();
      if (chance.oneIn(8)) throw new Error("opening");
      if (chance.oneIn(2)) signal.throwIfAborted(); // half of them heed it
      if (chance.oneIn(10)) { // settles, perhaps before its task
        lend(new Client());
        await chance.ticks();
        throw new Error("early");
      }
      await lend(client);
      await chance.ticks();
      if (chance.oneIn(8)) throw new Error("COMMIT");
      stored.push(...client.rows);
    } finally {
      client.rows = [];
      pool.push(client);
      await chance.ticks();
      openers--;
    }
  });

  /** Does something in a task: as it is, in a part, or in a task of its own. */
  async function step(log: Log, depth: number): Promise<void> {
    await chance.ticks();
    const way = chance.pick(6);
    if (way === 0) {
      lazy.get(); // nobody awaits it
      if (chance.oneIn(2)) throw new Error("task");
    } else if (way < 3 && depth < 4) {
      log.pending++;
      const part = lazy.run(branches, log, depth + 1).catch((error) => {
        log.failed = true;
        throw error;
      }).finally(() => log.pending--);
      if (chance.oneIn(4)) part.catch(() => {}); // nobody awaits it
      else await part;
    } else if (way === 3 && depth < 4) {
      await start(chance.oneIn(2) ? lazy.runNew : outside, depth + 1);
    } else {
      const client = await lazy.get();
      await chance.ticks();
      client.insert(log);
      log.inserted++;
    }
  }

  /** Does several things at once, which may outlive what they are started by. */
  async function branches(log: Log, depth: number): Promise<void> {
    const branch = () =>
      step(log, depth).catch((error) => {
        if (chance.oneIn(2)) throw error;
      });
    await Promise.all(Array.from({ length: 1 + chance.pick(3) }, branch));
  }

  /** Starts a task, in another or outside of any. */
  async function start(run: typeof lazy.run, depth = 0): Promise<void> {
    const log = new Log();
    logs.push(log);
    await run.call(lazy, async () => {
      await branches(log, depth);
      log.mustFail = log.failed;
    });
    log.resolved = true;
    await flush();
    if (log.pending > 0) log.mustFail = true;
  }

  const leave = AsyncLocalStorage.snapshot();
  const outside: typeof lazy.run = (...args) => leave(() => lazy.run(...args));

  const starts = [start(lazy.run), start(lazy.runNew), start(lazy.run)];
  const settled = Promise.allSettled(starts);
  if (chance.oneIn(2)) await settled;
  else for (let i = 0; i < 5; i++) await chance.ticks();
  await lazy[Symbol.asyncDispose]();
  assertEquals(openers, 0);
  await settled;
  await flush(); // branches that outlive their tasks
  for (const log of logs) {
    const rows = stored.filter((row) => row === log).length;
    assertEquals(rows, log.resolved ? log.inserted : 0);
    assert(!(log.mustFail && log.resolved));
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
    const close = () => void open.delete(socket);
    const socket = { close, [Symbol.dispose]: close };
    open.add(socket);
    return socket;
  };
  // It has overloads that no arrow function has
  Deno.connect = connect as object as typeof Deno.connect;
  const lazy = new LazyConnection({ port: 1 });

  /** Closes a socket in some way, however it got it. */
  async function block(): Promise<void> {
    const controller = new AbortController();
    chance.ticks().then(() => controller.abort("enough"));
    const options = chance.oneIn(3) ? { signal: controller.signal } : {};
    const conn = await (chance.oneIn(2) ? lazy.connect(options) : lazy.get());
    await chance.ticks();
    if (!disposed && !open.has(conn)) broken.push("it is closed");
    const again = lazy.get();
    if (chance.oneIn(2)) conn.close();
    else conn[Symbol.dispose]();
    if (await again !== conn) broken.push("the task has another");
  }

  async function task(): Promise<void> {
    for (let i = chance.pick(4); i > 0; i--) {
      await (chance.oneIn(2) ? block() : lazy.run(block)).catch(() => {});
      if (chance.oneIn(3)) lazy.runNew(task).catch(() => {});
    }
    if (chance.oneIn(2)) lazy.connect().catch(() => {}); // is cancelled
  }

  const starts = [lazy.runNew(task), lazy.runNew(task), task()];
  const settled = Promise.allSettled(starts);
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
