// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Prints how many times as long ours takes as the same by hand, and fails where
 * a goal is missed.
 *
 * Each figure is the middle one of five measurements, with the lowest and the
 * highest. A measurement is the median of many rounds' ratios. A goal is missed
 * where even the lowest is above it: a machine that is busy for a while raises
 * some of the five, a module that is too slow raises all.
 *
 * @module
 */
import { AsyncLocalStorage } from "node:async_hooks";
import {
  type Case,
  cases,
  type Run,
  runBatch,
} from "../lazy_connection_bench.ts";
import { LazyConnection } from "../mod.ts";

const MEASUREMENTS = 5;

/** Milliseconds that a batch of one side takes. */
async function time(timed: Case, side: Run): Promise<number> {
  const start = performance.now();
  await runBatch(timed, side);
  return performance.now() - start;
}

function median(numbers: number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
}

/** Measures a ratio, with the sides of each round in random order. */
async function ratio(timed: Case): Promise<number> {
  const ratios: number[] = [];
  for (let i = 0; i < timed.rounds; i++) {
    const sides = [timed.ours, timed.byHand];
    if (Math.random() < 0.5) sides.reverse();
    const times = new Map<Run, number>();
    for (const side of sides) times.set(side, await time(timed, side));
    ratios.push(times.get(timed.ours)! / times.get(timed.byHand)!);
  }
  return median(ratios);
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
  const tasks = Array.from({ length: count }, () =>
    run(async () => {
      await promise;
    }));
  await Promise.resolve();
  gc();
  const bytes = (Deno.memoryUsage().heapUsed - before) / count;
  resolve();
  await Promise.all(tasks);
  return bytes;
}

/** Measures how many bytes more a waiting task takes than a waiting `als.run`. */
async function waitingMore(): Promise<number> {
  const { gc } = globalThis as { gc?: () => void };
  if (!gc) throw new Error("Cannot measure memory: run `deno task ratios`");
  const als = new AsyncLocalStorage<object>();
  const lazy = new LazyConnection({ port: 1 }); // never connects
  const ours = await waiting(gc, (task) => lazy.runNew(task));
  return ours - await waiting(gc, (task) => als.run({}, task));
}

const rows = [
  ...cases.map((timed) => {
    const { name, goal } = timed;
    return { name, goal, digits: 2, measure: () => ratio(timed) };
  }),
  {
    name: "bytes of a waiting task",
    goal: 600,
    digits: 0,
    measure: waitingMore,
  },
].map((row) => ({ ...row, figures: [] as number[] }));

// All rows in turn, so that what slows the machine down slows few of a row's
for (let i = 0; i < MEASUREMENTS; i++) {
  for (const { figures, measure } of rows) figures.push(await measure());
}

let missed = false;
for (const { name, goal, digits, figures } of rows) {
  const spread = [Math.min(...figures), median(figures), Math.max(...figures)];
  const [low, middle, high] = spread.map((figure) => figure.toFixed(digits));
  const isMissed = Number(low) > goal;
  if (isMissed) missed = true;
  const note = isMissed ? ", MISSED" : "";
  console.log(`${name}: ${middle} [${low}–${high}], goal ${goal}${note}`);
}
Deno.exit(missed ? 1 : 0); // the server would go on
