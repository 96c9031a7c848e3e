"""What guessing ahead brings: tokens a second with it and without, on text that repeats and on text that does
not.

    python benchmarks/speculate.py --model out/small --out benchmarks/speculate.json
    python benchmarks/speculate.py --model gemma3-270m --draft gemma3-270m --out benchmarks/draft.json

Ways: prompt look-up, and with --draft a draft model (the second line: float32 with its own int8 form ahead).
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
    parser.add_argument("--draft", help="a model that guesses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("speculate.json"))
    options = parser.parse_args()
    plain = load(options.model)
    ways = {"look-up": load(options.model, speculate="lookup")}
    if options.draft:
        ways["draft model"] = load(options.model, speculate=options.draft)
    rows: list[dict[str, Any]] = []
    for language, text in declaration().items():
        ids = plain.tokenizer.encode(text)[:300]
        for kind, prompt in (("plain", ids), ("repeats", [*ids, *ids[:150]])):
            turns = []
            for turn in range(options.rounds):  # another prompt each time: nothing is known yet
                ids = [plain.tokenizer.bos_id, *prompt[turn:]]
                turns.append({way: run(vlm, ids) for way, vlm in {"none": plain, **ways}.items()})
            speed = {way: statistics.median(turn[way][0] for turn in turns) for way in turns[0]}
            for way in ways:
                pairs = [(turn["none"][1], turn[way][1]) for turn in turns]
                rows.append(
                    {
                        "language": language, "text": kind, "way": way,
                        "tokens/s": speed[way], "without": speed["none"], "gain": speed[way] / speed["none"],
                        "guessed": sum(one.drafted for _, one in pairs),
                        "accepted": sum(one.accepted for _, one in pairs),
                        "same": all(one.ids == other.ids for one, other in pairs),
                    }
                )  # fmt: skip
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    for way in ways:
        for kind in ("plain", "repeats"):
            gains = [row["gain"] for row in rows if (row["text"], row["way"]) == (kind, way)]
            mean = statistics.geometric_mean(gains)
            print(f"{way}, {kind}: {mean:.2f} x ({min(gains):.2f} to {max(gains):.2f})")
    told = {"machine": machine(), "model": Path(options.model).name, "rows": rows}
    options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
