// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * What `LazyConnection` costs beside the same done by hand.
 *
 * ```sh
 * deno bench --allow-net    # the averages of each side
 * deno task ratios          # the ratios in the README
 * ```
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { LazyConnection } from "./mod.ts";

type Run = () => void | Promise<void>;

interface Case {
  group: string;
  /** How often `deno bench` runs each side, where the system sets a limit. */
  n?: number;
  baseline: string;
  /** The ratio that is not to be exceeded. */
  goal: number;
  /** How many runs make one sample. */
  runs: number;
  ours: Run;
  byHand: Run;
}

// In a thread of its own, or the server would be measured as well
const server = new Worker(
  `data:text/javascript,${
    encodeURIComponent(`
      const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      postMessage(listener.addr.port);
      for await (const conn of listener) {
        conn.read(new Uint8Array(1)).catch(() => {}).then(() => conn.close());
      }
    `)
  }`,
  { type: "module" },
);
const port = await new Promise<number>((resolve) => {
  server.onmessage = ({ data }) => resolve(data);
});

const als = new AsyncLocalStorage<object>();
const lazy = new LazyConnection({ port });

// All that is asynchronous is an async function, or `deno bench` does not wait
const connectOurs = async () => {
  await lazy.run(async () => {
    await using _conn = await lazy.connect();
  });
};
const connectByHand = async () => {
  await als.run({}, async () => {
    const { signal } = new AbortController();
    await using _conn = await Deno.connect({ port, signal });
  });
};
const connectBare = async () => {
  using _conn = await Deno.connect({ port });
};
const times = (n: number, run: Run) => async () => {
  await Promise.all(Array.from({ length: n }, run));
};

const costless = { [Symbol.asyncDispose]: () => Promise.resolve() };
const opened = Promise.resolve(costless);
const lazyCostless = new LazyConnection(() => opened);

// Calls a function in a task that has a connection, and inside `als.run`
const lazyOpen = new LazyConnection(() =>
  Promise.resolve({ [Symbol.dispose]() {} })
);
const inTask = await new Promise<(fn: () => void) => void>((resolve) => {
  als.run({}, () =>
    lazyOpen.run(async () => {
      await lazyOpen.connect();
      resolve(AsyncLocalStorage.snapshot());
      await new Promise(() => {}); // stays a task
    }));
});
const lookUp = (get: () => unknown) => () =>
  inTask(() => {
    for (let i = 0; i < 10_000; i++) get();
  });

// A system soon runs out of ports: each stays taken for a while once it is closed
const cases: Case[] = [
  {
    group: "the module's own work",
    baseline: "als.run and await using",
    goal: 2.5,
    runs: 2_000,
    ours: async () => {
      await lazyCostless.run(async () => {
        await using _conn = await lazyCostless.connect();
      });
    },
    byHand: async () => {
      await als.run({}, async () => {
        await using _conn = costless;
      });
    },
  },
  {
    group: "10,000 look-ups of lazy.current",
    baseline: "als.getStore",
    goal: 5,
    runs: 1,
    ours: lookUp(() => lazyOpen.current),
    byHand: lookUp(() => als.getStore()),
  },
  {
    group: "connect and close one, on loopback",
    n: 2_000,
    baseline: "by hand",
    goal: 1.05,
    runs: 20,
    ours: connectOurs,
    byHand: connectByHand,
  },
  {
    group: "connect and close one, as bare as can be",
    n: 2_000,
    baseline: "bare Deno.connect",
    goal: 1.2,
    runs: 20,
    ours: connectOurs,
    byHand: connectBare,
  },
  {
    group: "connect and close 500 at once",
    n: 8,
    baseline: "by hand",
    goal: 1.05,
    runs: 1,
    ours: times(500, connectOurs),
    byHand: times(500, connectByHand),
  },
];

for (const { group, n, baseline, ours, byHand } of cases) {
  const options = { group, ...(n && { n, warmup: n >> 2 }) };
  Deno.bench({ ...options, name: baseline, baseline: true, fn: byHand });
  Deno.bench({ ...options, name: "LazyConnection", fn: ours });
}

/** Milliseconds that `n` runs take. */
async function time(run: Run, n: number): Promise<number> {
  const start = performance.now();
  for (let i = 0; i < n; i++) await run();
  return performance.now() - start;
}

function median(numbers: number[]): number {
  return numbers.sort((a, b) => a - b)[numbers.length >> 1]!;
}

/** The median of what the sides, taking turns, took in relation. */
async function ratio({ ours, byHand, runs }: Case): Promise<number> {
  const ratios: number[] = [];
  const start = performance.now();
  for (let i = 0; performance.now() - start < 6_000; i++) {
    const oursFirst = i % 2 ? await time(ours, runs) : 0;
    const theirs = await time(byHand, runs);
    ratios.push((oursFirst || await time(ours, runs)) / theirs);
  }
  return median(ratios.slice(ratios.length >> 2)); // the rest is warm-up
}

/** Bytes of heap that a task takes while it waits. */
async function waiting(
  gc: () => void,
  run: (task: () => Promise<void>) => Promise<void>,
): Promise<number> {
  const count = 20_000;
  const { promise, resolve } = Promise.withResolvers<void>();
  gc();
  const before = Deno.memoryUsage().heapUsed;
  const tasks = Array.from({ length: count }, () => run(() => promise));
  await Promise.resolve();
  gc();
  const bytes = (Deno.memoryUsage().heapUsed - before) / count;
  resolve();
  await Promise.all(tasks);
  return bytes;
}

if (import.meta.main) {
  for (const it of cases) {
    const times = (await ratio(it)).toFixed(2);
    console.log(`${it.group}: ${times} x ${it.baseline}, goal ${it.goal}`);
  }
  // Set by --expose-gc
  const { gc } = globalThis as { gc?: () => void };
  if (gc) {
    const bytes: number[] = [];
    for (let i = 0; i < 5; i++) {
      const ours = await waiting(gc, (task) => lazy.run(task));
      bytes.push(ours - await waiting(gc, (task) => als.run({}, task)));
    }
    console.log(
      `a task that waits: ${
        median(bytes).toFixed()
      } bytes more than als.run, goal 768`,
    );
  }
  Deno.exit(); // the server and the task that waits go on
}
