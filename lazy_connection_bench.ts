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

export type Run = () => void | Promise<void>;

/** Two sides that do the same, and how much longer ours may take. */
export interface Case {
  name: string;
  /** The ratio that is not to be exceeded. */
  goal: number;
  /** How many runs, one after the other, are timed together. */
  batch: number;
  /** How many batches of each side are timed. */
  rounds: number;
  /** Whether it takes ports, of which there are only so many. */
  connects: boolean;
  baseline: string;
  byHand: Run;
  ours: Run;
}

// In a thread of its own, or the server would be measured as well. It listens on
// several ports: a closed connection keeps its pair of ports taken for a while,
// and with thousands of those it takes ever longer to find a free pair.
const server = new Worker(
  `data:text/javascript,${
    encodeURIComponent(`
      const listeners = Array.from(
        { length: 4 },
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

// All that is asynchronous is an async function, or `deno bench` does not wait
const getOurs = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    await lazy.get();
  });
};
const connectOurs = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    await using _conn = await lazy.connect();
  });
};
const byHand = async () => {
  const port = ports[nextTurn()]!;
  await als.run({}, async () => {
    const { signal } = new AbortController();
    await using _conn = await Deno.connect({ port, signal });
  });
};
const bare = async () => {
  const port = ports[nextTurn()]!;
  using _conn = await Deno.connect({ port });
};
const atOnce = (count: number, run: () => Promise<void>) => async () => {
  await Promise.all(Array.from({ length: count }, run));
};

const costless = { [Symbol.asyncDispose]: () => Promise.resolve() };
const lazyCostless = new LazyConnection<object>((lend) => lend(costless));
const lazyNew = new LazyConnection<Disposable>((lend) =>
  lend({ [Symbol.dispose]() {} })
);
const shared = new AbortController();
const connectCostless = async (options?: { signal: AbortSignal }) => {
  await lazyNew.run(async () => {
    await using _conn = await lazyNew.connect(options);
  });
};

// Calls a function in a task that has a connection, and inside `als.run`
const promise = Promise.resolve({});
const lazyOpen = new LazyConnection<object>((lend) => lend({}));
const inTask = await new Promise<(fn: Run) => void | Promise<void>>(
  (resolve) => {
    als.run({ promise }, () =>
      lazyOpen.run(async () => {
        await lazyOpen.get();
        resolve(AsyncLocalStorage.snapshot());
        await new Promise(() => {}); // stays a task
      }));
  },
);

const connecting = {
  batch: 10,
  rounds: 500,
  connects: true,
  baseline: "als.run, AbortController, Deno.connect, await using",
  byHand,
};
const costing = { batch: 10, rounds: 500, connects: false };
export const cases: Case[] = [
  { ...connecting, name: "run() with get()", goal: 1.05, ours: getOurs },
  {
    ...connecting,
    name: "run() with connect() and await using",
    goal: 1.1,
    ours: connectOurs,
  },
  {
    ...connecting,
    name: "run() with get(), bare",
    goal: 1.25,
    baseline: "Deno.connect, using",
    byHand: bare,
    ours: getOurs,
  },
  {
    ...connecting,
    name: "run() with get(), 500 at once",
    goal: 1.1,
    batch: 1,
    rounds: 50, // of a thousand connections, or the pairs of ports run out
    baseline: "500 by hand",
    byHand: atOnce(500, byHand),
    ours: atOnce(500, getOurs),
  },
  {
    ...costing,
    name: "connect(), 10,000 at once with a shared signal",
    goal: 2,
    batch: 1,
    rounds: 50,
    baseline: "connect(), 10,000 at once",
    byHand: atOnce(10_000, () => connectCostless()),
    ours: atOnce(10_000, () => connectCostless(shared)),
  },
  {
    ...costing,
    name: "own work",
    goal: 2.5,
    baseline: "als.run, await using",
    byHand: async () => {
      await als.run({}, async () => {
        await using _conn = costless;
      });
    },
    ours: async () => {
      await lazyCostless.run(async () => {
        await lazyCostless.get();
      });
    },
  },
  {
    ...costing,
    name: "current",
    goal: 2,
    baseline: "als.getStore",
    byHand: () =>
      inTask(() => {
        for (let i = 0; i < 10_000; i++) als.getStore();
      }),
    ours: () =>
      inTask(() => {
        for (let i = 0; i < 10_000; i++) lazyOpen.current;
      }),
  },
  {
    ...costing,
    name: "get() of an open connection",
    goal: 1.5,
    baseline: "await als.getStore().promise",
    byHand: async () =>
      await inTask(async () => {
        for (let i = 0; i < 100; i++) await als.getStore()!.promise;
      }),
    ours: async () =>
      await inTask(async () => {
        for (let i = 0; i < 100; i++) await lazyOpen.get();
      }),
  },
];

export async function repeat(run: Run, count: number): Promise<void> {
  for (let i = 0; i < count; i++) await run();
}

// In batches, as in the ratios: among single runs a pause of the garbage
// collector weighs too much in an average. The times are those of a batch.
// What takes no ports runs as often as `deno bench` finds it necessary.
for (const it of cases) {
  const { batch, baseline, byHand, ours } = it;
  const limit = it.connects ? { n: it.rounds, warmup: it.rounds >> 2 } : {};
  const options = { group: it.name, ...limit };
  Deno.bench({
    ...options,
    name: baseline,
    baseline: true,
    fn: async () => await repeat(byHand, batch),
  });
  Deno.bench({
    ...options,
    name: "LazyConnection",
    fn: async () => await repeat(ours, batch),
  });
}
