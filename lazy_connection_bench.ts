// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * What `LazyConnection` costs beside the same done by hand.
 *
 * ```sh
 * deno bench --allow-net    # the times of each side, as averages
 * deno task ratios          # the ratios, as medians, and the goals
 * ```
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { LazyConnection } from "./mod.ts";

/** What is timed. It is an async function, or `deno bench` does not wait. */
export type Run = () => Promise<void>;

/** Two sides that do the same, and how much longer ours may take. */
export interface Case {
  name: string;
  /** The ratio that is not to be exceeded. */
  goal: number;
  /** How many runs, one after the other, are timed together. */
  batch: number;
  /** How many batches of each side are timed. */
  rounds: number;
  /** What `Deno.connect` is meanwhile. */
  connect: typeof Deno.connect;
  baseline: string;
  byHand: Run;
  ours: Run;
}

/** A `Deno.connect` that costs nothing, so that what is ours shows. */
class Socket implements Disposable {
  [Symbol.dispose]() {}
}
// Neither it nor what it gives has all that there is to the real one
const costless =
  (() => Promise.resolve(new Socket())) as unknown as typeof Deno.connect;
const { connect } = Deno;

// In a thread of its own, or the server would be measured as well. It listens on
// several ports: a closed connection keeps its pair of ports taken for a while,
// and with thousands of those it takes ever longer to find a free pair.
const server = new Worker(
  `data:text/javascript,${
    encodeURIComponent(`
      const listeners = Array.from(
        { length: 12 },
        () => Deno.listen({ hostname: "127.0.0.1", port: 0 }),
      );
      postMessage(listeners.map((listener) => listener.addr.port));
      for (const listener of listeners) accept(listener);
      async function accept(listener) {
        for await (const conn of listener) {
          conn.read(new Uint8Array(1)).catch(() => {}).then(() => conn.close());
        }
      }
    `)
  }`,
  { type: "module" },
);
const ports = await new Promise<number[]>((resolve) => {
  server.onmessage = ({ data }) => resolve(data);
});

const als = new AsyncLocalStorage<{ promise?: Promise<object> }>();
const lazies = ports.map((port) => new LazyConnection({ port }));

/** Each port in turn, by its index. */
let turn = 0;
const nextTurn = () => turn = (turn + 1) % ports.length;

const byHand = async () => {
  const port = ports[nextTurn()]!;
  await als.run({}, async () => {
    const { signal } = new AbortController();
    await using _conn = await Deno.connect({ port, signal });
  });
};
const getting = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    await lazy.get();
  });
};
const awaitUsing = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    await using _conn = await lazy.connect();
  });
};
const using = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    using _conn = await lazy.connect();
  });
};
const { signal } = new AbortController();
const connecting = async (options?: { signal: AbortSignal }) => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    using _conn = await lazy.connect(options);
  });
};
const atOnce = (count: number, run: Run) => async () => {
  await Promise.all(Array.from({ length: count }, () => run()));
};

// Calls a function in a task that has a connection, and inside `als.run`
const promise = Promise.resolve({});
const lazyOpen = new LazyConnection<object>((lend) => lend({}));
const inTask = await new Promise<(run: Run) => Promise<void>>((resolve) => {
  als.run({ promise }, () =>
    lazyOpen.run(async () => {
      await lazyOpen.get();
      resolve(AsyncLocalStorage.snapshot());
      await new Promise(() => {}); // stays a task
    }));
});

const steady = {
  batch: 20,
  rounds: 5_000, // so that most of them run hot
  connect: costless,
  baseline: "als.run, AbortController, await using",
  byHand,
};
const loopback = { ...steady, batch: 10, rounds: 500, connect };
export const cases: Case[] = [
  { ...steady, name: "run() with get()", goal: 1.5, ours: getting },
  { ...steady, name: "run() with await using", goal: 2.2, ours: awaitUsing },
  { ...steady, name: "run() with using", goal: 1.8, ours: using },
  {
    ...steady,
    name: "get() of an open connection",
    goal: 1.5,
    baseline: "await als.getStore().promise",
    byHand: () =>
      inTask(async () => {
        for (let i = 0; i < 100; i++) await als.getStore()!.promise;
      }),
    ours: () =>
      inTask(async () => {
        for (let i = 0; i < 100; i++) await lazyOpen.get();
      }),
  },
  {
    ...steady,
    name: "current",
    goal: 2,
    baseline: "als.getStore",
    byHand: () =>
      inTask(async () => {
        for (let i = 0; i < 1_000; i++) als.getStore();
        await promise;
      }),
    ours: () =>
      inTask(async () => {
        for (let i = 0; i < 1_000; i++) lazyOpen.current;
        await promise;
      }),
  },
  {
    ...steady,
    name: "connect(), 10,000 at once with a shared signal",
    goal: 2,
    batch: 1,
    rounds: 50,
    baseline: "connect(), 10,000 at once",
    byHand: atOnce(10_000, () => connecting()),
    ours: atOnce(10_000, () => connecting({ signal })),
  },
  { ...loopback, name: "loopback, get()", goal: 1.06, ours: getting },
  { ...loopback, name: "loopback, await using", goal: 1.15, ours: awaitUsing },
  {
    ...loopback,
    name: "loopback, get(), 500 at once",
    goal: 1.1,
    batch: 1,
    rounds: 50, // of a thousand connections, or the pairs of ports run out
    baseline: "500 by hand",
    byHand: atOnce(500, byHand),
    ours: atOnce(500, getting),
  },
];

/** Runs a batch of one side. */
export async function runBatch(it: Case, side: Run): Promise<void> {
  Deno.connect = it.connect;
  for (let i = 0; i < it.batch; i++) await side();
}

// In batches, as in the ratios: among single runs a pause of the garbage
// collector weighs too much in an average. The times are those of a batch.
// What takes no ports runs as often as `deno bench` finds it necessary.
for (const it of cases) {
  const takesPorts = it.connect === connect;
  const options = {
    group: it.name,
    ...(takesPorts ? { n: it.rounds, warmup: it.rounds >> 2 } : {}),
  };
  Deno.bench({
    ...options,
    name: it.baseline,
    baseline: true,
    fn: async () => await runBatch(it, it.byHand),
  });
  Deno.bench({
    ...options,
    name: "LazyConnection",
    fn: async () => await runBatch(it, it.ours),
  });
}
