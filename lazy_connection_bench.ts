// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * What `LazyConnection` costs beside the same done by hand.
 *
 * ```sh
 * deno bench --allow-net    # the times of each side, as averages
 * deno task ratios          # the ratios in the README, as medians
 * ```
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { LazyConnection } from "./mod.ts";

export type Run = () => void | Promise<void>;

/** Two sides that do the same, and how much more ours may take. */
export interface Case {
  /** The row in the README. */
  name: string;
  /** The ratio that is not to be exceeded. */
  goal: number;
  /** The ratio past which it is a defect, where a goal missed is not yet one. */
  defect?: number;
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

const als = new AsyncLocalStorage<object>();
const lazies = ports.map((port) => new LazyConnection({ port }));

/** Each port in turn, by its index. */
let turn = 0;
const nextTurn = () => turn = (turn + 1) % ports.length;

// All that is asynchronous is an async function, or `deno bench` does not wait
const connectOurs = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.run(async () => {
    await using _conn = await lazy.connect();
  });
};
const connectByHand = async () => {
  const port = ports[nextTurn()]!;
  await als.run({}, async () => {
    const { signal } = new AbortController();
    await using _conn = await Deno.connect({ port, signal });
  });
};
const connectBare = async () => {
  const port = ports[nextTurn()]!;
  using _conn = await Deno.connect({ port });
};
const atOnce = (count: number, run: () => Promise<void>) => async () => {
  await Promise.all(Array.from({ length: count }, run));
};

const costless = { [Symbol.asyncDispose]: () => Promise.resolve() };
const opened = Promise.resolve(costless);
const lazyCostless = new LazyConnection(() => opened);

// Calls a function in a task that has a connection, and inside `als.run`
const lazyOpen = new LazyConnection(() => ({ [Symbol.dispose]() {} }));
const inTask = await new Promise<(fn: () => void) => void>((resolve) => {
  als.run({}, () =>
    lazyOpen.run(async () => {
      await lazyOpen.connect();
      resolve(AsyncLocalStorage.snapshot());
      await new Promise(() => {}); // stays a task
    }));
});
export const cases: Case[] = [
  {
    name: "connect and close one, by hand",
    goal: 1.05,
    defect: 1.1,
    batch: 10,
    rounds: 500,
    connects: true,
    baseline: "als.run, AbortController, Deno.connect, await using",
    byHand: connectByHand,
    ours: connectOurs,
  },
  {
    name: "connect and close one, bare",
    goal: 1.25,
    batch: 10,
    rounds: 500,
    connects: true,
    baseline: "Deno.connect, using",
    byHand: connectBare,
    ours: connectOurs,
  },
  {
    name: "connect and close 500 at once",
    goal: 1.05,
    batch: 1,
    rounds: 50, // of a thousand connections, or the pairs of ports run out
    connects: true,
    baseline: "500 by hand",
    byHand: atOnce(500, connectByHand),
    ours: atOnce(500, connectOurs),
  },
  {
    name: "own work",
    goal: 3,
    batch: 10,
    rounds: 500,
    connects: false,
    baseline: "als.run, await using",
    byHand: async () => {
      await als.run({}, async () => {
        await using _conn = costless;
      });
    },
    ours: async () => {
      await lazyCostless.run(async () => {
        await using _conn = await lazyCostless.connect();
      });
    },
  },
  {
    name: "current",
    goal: 2,
    batch: 10,
    rounds: 500,
    connects: false,
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
