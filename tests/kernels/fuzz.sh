#!/usr/bin/env bash
# tests/kernels/fuzz.sh SECONDS fuzzes the CPU kernel with libFuzzer, AddressSanitizer and UBSan, from tests/kernels/cpp/corpus.
# New inputs are kept in build/fuzz; with MERGE=1 those that add coverage are added to the corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:?usage: tests/kernels/fuzz.sh SECONDS}
compiler=$(command -v clang++ || compgen -c clang++- | sort -u | head -1)
[ -n "$compiler" ] || { echo "tests/kernels/fuzz.sh needs clang++ with libFuzzer" >&2; exit 2; }

mkdir -p build/fuzz/finds
# Coverage of the kernel's branches only, not of the test's.
printf 'src:*\nfun:*12llm_sampling*\n' >build/fuzz/allowlist.txt
flags=(-std=c++17 -O2 -g -ffp-contract=off -fno-trapping-math -fno-math-errno -pthread)
# AddressSanitizer then also sees what lies between the size of a vector and its capacity.
flags+=(-D_GLIBCXX_SANITIZE_VECTOR)
"$compiler" "${flags[@]}" -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
  -fsanitize-coverage-allowlist=build/fuzz/allowlist.txt \
  tests/kernels/cpp/fuzz_cpu.cpp -ldl -o build/fuzz/fuzz_cpu
run=(build/fuzz/fuzz_cpu -max_len=512 -timeout=60 -artifact_prefix=build/fuzz/)
"${run[@]}" -len_control=0 -max_total_time="$seconds" -print_final_stats=1 build/fuzz/finds tests/kernels/cpp/corpus
if [ "${MERGE:-0}" = 1 ]; then
  "${run[@]}" -merge=1 tests/kernels/cpp/corpus build/fuzz/finds
fi
