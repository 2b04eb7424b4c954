// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Prints how much longer ours takes than the same by hand, and fails where a
 * goal is missed.
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

/** Milliseconds that a batch of one side takes. */
async function time(it: Case, side: Run): Promise<number> {
  const start = performance.now();
  await runBatch(it, side);
  return performance.now() - start;
}

function median(numbers: number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
}

/**
 * How many times as long ours takes. Whatever slows the machine down for a
 * while slows both sides of a round, or is one round that the median ignores.
 */
async function ratio(it: Case): Promise<number> {
  const ratios: number[] = [];
  for (let i = 0; i < it.rounds; i++) {
    const sides = [it.ours, it.byHand];
    if (Math.random() < 0.5) sides.reverse();
    const times = new Map<Run, number>();
    for (const side of sides) times.set(side, await time(it, side));
    ratios.push(times.get(it.ours)! / times.get(it.byHand)!);
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

/** How many bytes more a waiting task takes than a waiting `als.run`. */
async function waitingMore(): Promise<number> {
  const { gc } = globalThis as { gc?: () => void };
  if (!gc) throw new Error("Cannot measure memory: run `deno task ratios`");
  const als = new AsyncLocalStorage<object>();
  const lazy = new LazyConnection({ port: 1 }); // never connects
  const bytes: number[] = [];
  for (let i = 0; i < 5; i++) {
    const ours = await waiting(gc, (task) => lazy.run(task));
    bytes.push(ours - await waiting(gc, (task) => als.run({}, task)));
  }
  return median(bytes);
}

let missed = false;

/**
 * Reports the lowest of up to five measurements: a machine that is busy for a
 * while passes, while a module that is too slow stays so.
 */
async function report(
  name: string,
  goal: number,
  digits: number,
  measure: () => Promise<number>,
) {
  let lowest = Infinity;
  for (let i = 0; i < 5 && lowest > goal; i++) {
    lowest = Math.min(lowest, Number((await measure()).toFixed(digits)));
  }
  const met = lowest <= goal;
  if (!met) missed = true;
  const figure = lowest.toFixed(digits);
  console.log(`${name}: ${figure}, goal ${goal}${met ? "" : ", MISSED"}`);
}

for (const it of cases) await report(it.name, it.goal, 2, () => ratio(it));
await report("bytes of a waiting task", 768, 0, waitingMore);
Deno.exit(missed ? 1 : 0); // the server would go on
