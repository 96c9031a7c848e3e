"""What prompt look-up brings: tokens a second with it and without, on text that repeats and on text that
does not.

    python benchmarks/speculate.py --model out/small --out benchmarks/speculate.json

For each of eleven languages 300 tokens of the Universal Declaration of Human Rights, once as they are, and
once said twice with the second time broken off in the middle, which the model then goes on copying. 128 new
tokens, greedy; with and without take turns and must write the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from seavlm.engine.bench import declaration, machine
from seavlm.engine.sampler import Sampling
from seavlm.engine.sequence import Prompt, Sequence
from seavlm.engine.vlm import VLM, load

NEW_TOKENS = 128
ROUNDS = 3


def run(vlm: VLM, ids: list[int]) -> tuple[float, Sequence]:
    """Tokens a second from the first to the last, and the finished request."""
    greedy = Sampling(temperature=0)
    sequence = vlm.engine.add(Prompt(ids), greedy, max_new_tokens=NEW_TOKENS, stop_ids=())
    while not sequence.ids:
        vlm.engine.step()
    began, before = time.perf_counter(), len(sequence.ids)
    while not sequence.finished:
        vlm.engine.step()
    if sequence.error is not None:
        raise sequence.error
    return (len(sequence.ids) - before) / (time.perf_counter() - began), sequence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--quantize")
    parser.add_argument("--out", type=Path, default=Path("speculate.json"))
    options = parser.parse_args()
    pair = [load(options.model, quantize=options.quantize, speculate=on) for on in (False, True)]
    rows: list[dict[str, Any]] = []
    for language, text in declaration().items():
        ids = pair[0].tokenizer.encode(text)[:300]
        for kind, prompt in (("plain", ids), ("repeats", [*ids, *ids[:150]])):
            prompt = [pair[0].tokenizer.bos_id, *prompt]
            done = [[run(vlm, prompt) for vlm in pair] for _ in range(ROUNDS)]
            (_, alone), (_, guessed) = done[-1]
            plain, quick = (statistics.median(turn[i][0] for turn in done) for i in (0, 1))
            rows.append(
                {
                    "language": language, "text": kind, "plain": plain, "look-up": quick,
                    "gain": quick / plain,
                    "guessed": guessed.drafted, "accepted": guessed.accepted,
                    "same": list(alone.ids) == list(guessed.ids),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    for kind in ("plain", "repeats"):
        gains = [row["gain"] for row in rows if row["text"] == kind]
        print(f"{kind}: {statistics.geometric_mean(gains):.2f} x ({min(gains):.2f} to {max(gains):.2f})")
    options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
