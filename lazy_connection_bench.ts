// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * What `LazyConnection` costs beside the same done by hand.
 *
 * ```sh
 * deno bench --allow-net    # the times of each side, as averages
 * deno task ratios          # the ratios, with their spread, and the goals
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
  /** How many batches of each side are one measurement. */
  rounds: number;
  /** What `Deno.connect` is meanwhile. */
  connect: typeof Deno.connect;
  baseline: string;
  byHand: Run;
  ours: Run;
}

/** A `Deno.connect` that costs nothing, so that what is ours shows. */
class CostlessSocket implements Disposable {
  close() {}
  [Symbol.dispose]() {}
}
// Neither it nor what it gives has all that there is to the real one
const costless =
  (() =>
    Promise.resolve(new CostlessSocket())) as unknown as typeof Deno.connect;
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

const als = new AsyncLocalStorage<{ opened?: Promise<object> }>();
const lazies = ports.map((port) => new LazyConnection({ port }));

/** Each port in turn, by its index. */
let turn = 0;
const nextTurn = () => turn = (turn + 1) % ports.length;

const connectByHand = async () => {
  const port = ports[nextTurn()]!;
  await als.run({}, async () => {
    const { signal } = new AbortController();
    await using _conn = await Deno.connect({ port, signal });
  });
};
const getSocket = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.runNew(async () => {
    await lazy.get();
  });
};
const awaitUsingSocket = async () => {
  const lazy = lazies[nextTurn()]!;
  await lazy.runNew(async () => {
    await using _conn = await lazy.connect();
  });
};
const { signal } = new AbortController();
const usingSocket = async (options?: { signal: AbortSignal }) => {
  const lazy = lazies[nextTurn()]!;
  await lazy.runNew(async () => {
    using _conn = await lazy.connect(options);
  });
};
const atOnce = (count: number, run: Run) => async () => {
  await Promise.all(Array.from({ length: count }, () => run()));
};

/** A client that costs nothing. */
class Client {
  queries = 0;
  query(_sql: string) {
    this.queries++;
  }
}
const open = async (lend: (client: Client) => Promise<void>) => {
  const client = new Client();
  try {
    client.query("BEGIN");
    await lend(client);
    client.query("COMMIT");
  } catch (error) {
    client.query("ROLLBACK");
    throw error;
  }
};
const lazyClient = new LazyConnection<Client>(open);
const queryByHand = (count: number) => async () => {
  await open((client) =>
    als.run({ opened: Promise.resolve(client) }, async () => {
      const mine = await als.getStore()!.opened as Client;
      for (let i = 0; i < count; i++) mine.query("SELECT 1");
    })
  );
};
const query = (count: number) => async () => {
  await lazyClient.runNew(async () => {
    const mine = await lazyClient.get();
    for (let i = 0; i < count; i++) mine.query("SELECT 1");
  });
};

/** Calls a function in a task that has a connection, and inside `als.run`. */
const inTask = await new Promise<(run: Run) => Promise<void>>((resolve) => {
  als.run({ opened: Promise.resolve({}) }, () =>
    lazyClient.runNew(async () => {
      await lazyClient.get();
      resolve(AsyncLocalStorage.snapshot());
      await new Promise(() => {}); // stays a task
    }));
});
const work = async () => {};

const steady = {
  batch: 20,
  rounds: 1_000, // so that most of them run hot
  connect: costless,
  baseline: "als.run, AbortController, await using",
  byHand: connectByHand,
};
const loopback = { ...steady, batch: 10, rounds: 100, connect };
export const cases: Case[] = [
  {
    ...steady,
    name: "runNew() that asks for nothing",
    goal: 1.5,
    baseline: "als.run",
    byHand: async () => {
      await als.run({}, work);
    },
    ours: async () => {
      await lazyClient.runNew(work);
    },
  },
  { ...steady, name: "get()", goal: 1.75, ours: getSocket },
  { ...steady, name: "using", goal: 1.65, ours: () => usingSocket() },
  { ...steady, name: "await using", goal: 1.95, ours: awaitUsingSocket },
  {
    ...steady,
    name: "an opener's task",
    goal: 2.95,
    baseline: "als.run in a transaction",
    byHand: queryByHand(0),
    ours: query(0),
  },
  {
    ...steady,
    name: "ten queries through a stand-in",
    goal: 5.2,
    baseline: "ten queries of the object itself",
    byHand: queryByHand(10),
    ours: query(10),
  },
  {
    ...steady,
    name: "run() in a task, ten times",
    goal: 2,
    baseline: "await fn() in als.run, ten times",
    byHand: () =>
      inTask(async () => {
        for (let i = 0; i < 10; i++) await work();
      }),
    ours: () =>
      inTask(async () => {
        for (let i = 0; i < 10; i++) await lazyClient.run(work);
      }),
  },
  {
    ...steady,
    name: "get() of an open connection, a hundred times",
    goal: 1.35,
    baseline: "await als.getStore().opened, a hundred times",
    byHand: () =>
      inTask(async () => {
        for (let i = 0; i < 100; i++) await als.getStore()!.opened;
      }),
    ours: () =>
      inTask(async () => {
        for (let i = 0; i < 100; i++) await lazyClient.get();
      }),
  },
  {
    ...steady,
    name: "connect(), 10,000 at once with a shared signal",
    goal: 2,
    batch: 1,
    rounds: 10,
    baseline: "connect(), 10,000 at once",
    byHand: atOnce(10_000, () => usingSocket()),
    ours: atOnce(10_000, () => usingSocket({ signal })),
  },
  { ...loopback, name: "loopback, get()", goal: 1.1, ours: getSocket },
  {
    ...loopback,
    name: "loopback, await using",
    goal: 1.15,
    ours: awaitUsingSocket,
  },
  {
    ...loopback,
    name: "loopback, get(), 500 at once",
    goal: 1.1,
    batch: 1,
    rounds: 10, // of a thousand connections, or the pairs of ports run out
    baseline: "500 by hand",
    byHand: atOnce(500, connectByHand),
    ours: atOnce(500, getSocket),
  },
];

/** Runs a batch of one side. */
export async function runBatch(timed: Case, side: Run): Promise<void> {
  Deno.connect = timed.connect;
  for (let i = 0; i < timed.batch; i++) await side();
}

// In batches, as in the ratios: among single runs a pause of the garbage
// collector weighs too much in an average. The times are those of a batch.
// What takes no ports runs as often as `deno bench` finds it necessary.
for (const timed of cases) {
  const takesPorts = timed.connect === connect;
  const options = {
    group: timed.name,
    ...(takesPorts ? { n: timed.rounds, warmup: timed.rounds >> 2 } : {}),
  };
  Deno.bench({
    ...options,
    name: timed.baseline,
    baseline: true,
    fn: async () => await runBatch(timed, timed.byHand),
  });
  Deno.bench({
    ...options,
    name: "LazyConnection",
    fn: async () => await runBatch(timed, timed.ours),
  });
}
