// Copyright 2026 the LazyConnection authors. MIT license.

/**
 * Runs `deno test` on the tests and on the examples in the docs, with the
 * arguments given. Where JSR is out of reach, `@std` comes from npm.
 *
 * @module
 */
function deno(args: string[], stderr: "inherit" | "null" = "inherit") {
  return new Deno.Command(Deno.execPath(), { args, stderr }).spawn().status;
}

const std = ["jsr:@std/assert@^1", "jsr:@std/async@^1"];
const options = ["--doc", "--allow-net"];
if (!(await deno(["cache", "-q", ...std], "null")).success) {
  console.log("JSR is out of reach: @std comes from npm");
  options.push("--import-map=.ci/npm_import_map.json");
}
// Deno looks for tests in a dot-folder only if told to
const { code } = await deno(["test", ...options, ".", ".ci", ...Deno.args]);
Deno.exit(code);
