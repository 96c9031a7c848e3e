"""Energy and carbon of a run (Lacoste et al. 2019, "Quantifying the Carbon Emissions of Machine Learning"):

    kWh    = hours x watts x PUE / 1000
    kgCO2e = kWh x carbon intensity of the region's electricity

Watts are measured where the machine lets us (Intel/AMD RAPL counters, NVIDIA NVML, or codecarbon when asked
for), else given or assumed: the result says which. PUE, what a data centre draws for each watt of its
machines, is 1 unless given. The manufacture of hardware is not counted. No torch here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from seavlm import manifest
from seavlm.errors import SeavlmError, nearest

OWID = "Ember and Energy Institute, by Our World in Data (carbon-intensity-electricity)"
EMA = "Singapore's Energy Market Authority, average operating margin"
GOOGLE = "Google Cloud (GoogleCloudPlatform/region-carbon-info)"


class Grid(NamedTuple):
    """Electricity of a region: kg CO2e per kWh generated, of which year, by whom."""

    kg_per_kwh: float
    year: int
    source: str


INTENSITY: dict[str, Grid] = {
    "singapore": Grid(0.4168, 2022, EMA),
    "brunei": Grid(0.8939, 2022, OWID),
    "cambodia": Grid(0.4177, 2022, OWID),
    "indonesia": Grid(0.6759, 2022, OWID),
    "laos": Grid(0.2655, 2022, OWID),
    "malaysia": Grid(0.6058, 2022, OWID),
    "myanmar": Grid(0.3989, 2023, OWID),
    "philippines": Grid(0.6107, 2023, OWID),
    "thailand": Grid(0.5496, 2023, OWID),
    "timor-leste": Grid(0.6667, 2022, OWID),
    "vietnam": Grid(0.4754, 2023, OWID),
    "china": Grid(0.5823, 2023, OWID),
    "india": Grid(0.7134, 2023, OWID),
    "taiwan": Grid(0.6424, 2023, OWID),
    "united-states": Grid(0.3695, 2023, OWID),
    "world": Grid(0.4808, 2023, OWID),
    "asia-southeast1": Grid(0.36685, 2024, GOOGLE),  # Singapore
    "asia-southeast2": Grid(0.56055, 2024, GOOGLE),  # Jakarta
    "asia-east1": Grid(0.43929, 2024, GOOGLE),  # Taiwan
    "asia-east2": Grid(0.50502, 2024, GOOGLE),  # Hong Kong
    "asia-south1": Grid(0.67876, 2024, GOOGLE),  # Mumbai
    "asia-south2": Grid(0.53183, 2024, GOOGLE),  # Delhi
}
# Names that Amazon and Microsoft, who publish no intensity of their regions, give to places of the table.
ALIASES = {
    "ap-southeast-1": "singapore",
    "ap-southeast-3": "indonesia",
    "ap-southeast-5": "malaysia",
    "ap-southeast-7": "thailand",
    "southeastasia": "singapore",
    "indonesiacentral": "indonesia",
    "malaysiawest": "malaysia",
}

# Thermal design power in watts, from NVIDIA's data sheets and product briefs. SXM where nothing else is said.
TDP = {
    "H200": 700,
    "H200 NVL": 600,
    "H100": 700,
    "H100 NVL": 400,
    "H100 PCIe": 350,
    "A100": 400,
    "A100 PCIe": 300,
    "V100": 300,
    "L40S": 350,
    "L4": 72,
    "T4": 70,
    "A10G": 150,
    "RTX A6000": 300,
    "RTX 3090": 350,
    "RTX 4090": 450,
}
_GPUS = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(?:NVIDIA\s+)?(\S.*)", re.IGNORECASE)

# Assumed when nothing is measured and no watts are given: a busy core of a server with its share of the
# memory and the power supply. A 64-core server drawing 600-700 W comes to about ten watts a core.
WATTS_PER_CORE = 10.0

READ_EVERY = 30.0
"""Seconds between two readings of a meter that watches: the counters wrap within minutes."""
CODECARBON = "codecarbon"
FORMULA = "hours x watts x PUE / 1000 x kg per kWh (Lacoste et al. 2019)"


def grid(region: str) -> Grid:
    """The electricity of a country or a cloud's region; SeavlmError with the nearest names if unknown."""
    key = region.strip().lower().replace(" ", "-").replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in INTENSITY:
        raise SeavlmError(
            f"no carbon intensity is known for region {region!r}",
            hint=f"Known: {', '.join([*INTENSITY, *ALIASES])}.{nearest(key, [*INTENSITY, *ALIASES])}",
        )
    return INTENSITY[key]


def gpus(text: str) -> tuple[int, str, float]:
    """What "8 x H200" stands for: how many GPUs, which, and the watts of all at their TDP."""
    parts = _GPUS.fullmatch(text.strip())
    count, name = (int(parts[1] or 1), parts[2]) if parts else (1, text)
    known = {key.lower(): key for key in TDP}
    key = known.get(" ".join(name.lower().split()))
    if key is None or count < 1:
        raise SeavlmError(
            f"the watts of {text!r} are not known",
            hint=f"Give a number of watts, codecarbon, or GPUs such as '8 x H200': {', '.join(TDP)}."
            f"{nearest(name, TDP)}",
        )
    return count, key, float(count * TDP[key])


def footprint(hours: float, watts: float, kg_per_kwh: float, pue: float = 1.0) -> tuple[float, float]:
    """(kWh, kgCO2e) of `hours` at `watts` (the whole machine's, all devices together)."""
    kwh = hours * watts * pue / 1000.0
    return kwh, kwh * kg_per_kwh


@dataclass
class Meter:
    """Watches a run: `start()`, then `joules()` and `report()` at any time. In a `with` it starts, reads the
    counters every half minute, and ends: what it says from then on is what it said at the end.

    watts: a number (given), GPUs such as "8 x H200" (their TDP is assumed), "codecarbon" (measured by it, all
    processes of the machine), or None: RAPL and NVML are read, and where there is no RAPL, `cores` (default:
    all that this process may use) x WATTS_PER_CORE are assumed for the CPU. use_gpus says whether the energy
    of the GPUs that CUDA_VISIBLE_DEVICES leaves belongs to the run; the GPUs' and the packages' counters
    count everybody's work. kg_per_kwh replaces the region's published intensity. What is None is taken from
    SEAVLM_REGION (else singapore), SEAVLM_WATTS and SEAVLM_PUE (else 1).

    `seconds_before` and `joules_before` carry the part of a resumed run that went before; or `kept` is a file
    that carries them, for a run of the same `identity`. One that ends well is the only one left in there: one
    that was refused must not take what another has spent. SeavlmError for regions, watts and PUE that make no
    sense, at once and not after the run.
    """

    region: str | None = None
    watts: float | str | None = None
    kg_per_kwh: float | None = None
    pue: float | None = None
    cores: int | None = None
    use_gpus: bool = False
    seconds_before: float = 0.0
    joules_before: float = 0.0
    kept: Path | None = None
    identity: str = ""
    _start: float = field(default=0.0, repr=False)
    _gpus: tuple[int, str, float] | None = field(default=None, repr=False)
    _tracker: Any = field(default=None, repr=False)
    _tracker_joules: float = field(default=0.0, repr=False)
    _tracker_read: float = field(default=0.0, repr=False)
    _rapl: list[Path] = field(default_factory=list, repr=False)
    _rapl_last: list[int] = field(default_factory=list, repr=False)
    _rapl_joules: float = field(default=0.0, repr=False)
    _nvml: Any = field(default=None, repr=False)
    _nvml_start: list[int] = field(default_factory=list, repr=False)
    _nvml_names: list[str] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)
    _watch: threading.Thread | None = field(default=None, repr=False)
    _others: dict[str, Any] = field(default_factory=dict, repr=False)
    _end: tuple[float, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.region = self.region or os.environ.get("SEAVLM_REGION") or "singapore"
        if self.watts is None:
            self.watts = os.environ.get("SEAVLM_WATTS") or None
        if isinstance(self.watts, str) and self.watts != CODECARBON:
            with contextlib.suppress(ValueError):
                self.watts = float(self.watts)
        if isinstance(self.watts, str) and self.watts != CODECARBON:
            self._gpus = gpus(self.watts)
        elif isinstance(self.watts, float | int) and not (self.watts > 0 and math.isfinite(self.watts)):
            raise SeavlmError(f"{self.watts:g} watts are none that a machine draws", hint="Give more than 0.")
        if self.pue is None:
            given = os.environ.get("SEAVLM_PUE") or "1"
            try:
                self.pue = float(given)
            except ValueError:
                raise SeavlmError(f"SEAVLM_PUE is {given!r}", hint="Give a number such as 1.2.") from None
        if not 1 <= self.pue < math.inf:
            raise SeavlmError(
                f"the PUE is {self.pue:g}",
                hint="A data centre draws at least what its machines do: 1 or more.",
            )
        if self.kg_per_kwh is None:
            grid(self.region)  # an unknown region is an error now
        if self.cores is None:
            self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def start(self) -> Meter:
        if self.kept is not None:
            self._go_on(self.kept)
        self._start, self._end = time.monotonic(), None
        if self.watts == CODECARBON:
            self._tracker, self._tracker_read = _codecarbon(), self._start
        elif self.watts is None:
            self._rapl = _rapl_packages()
            self._rapl_last = [int((p / "energy_uj").read_text()) for p in self._rapl]
            if self.use_gpus:
                self._nvml, self._nvml_start, self._nvml_names = _nvml_counters()
        return self

    def __enter__(self) -> Meter:
        self.start()
        self._ended.clear()
        self._watch = threading.Thread(target=self._read, name="seavlm-carbon", daemon=True)
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        if self._watch is not None:
            self._watch.join()
        self._end = self.seconds(), self.joules(latest=True)
        if self._tracker is not None:
            self._tracker.stop_task()
        self._note({} if kind is None else self._others)

    @property
    def source(self) -> str:
        """given, assumed, or what measured: RAPL, NVML, RAPL+NVML, codecarbon and its version."""
        if self.watts == CODECARBON:
            return f"{CODECARBON} {manifest.version_of(CODECARBON)}"
        if self.watts is not None:
            return "assumed" if self._gpus else "given"
        measured = [name for name, on in (("RAPL", self._rapl), ("NVML", self._nvml)) if on]
        return "+".join(measured) if measured else "assumed"

    @property
    def assumed(self) -> str:
        """What of the watts is assumed; "" if nothing is."""
        if self._gpus:
            count, name, _ = self._gpus
            return f"{count} x {name} at the TDP of {TDP[name]} W, without the rest of the machine"
        if self.watts is None and not self._rapl:
            return f"{self.cores} cores at {WATTS_PER_CORE:g} W"
        return ""

    def seconds(self) -> float:
        return self._end[0] if self._end else self.seconds_before + time.monotonic() - self._start

    def joules(self, *, latest: bool = False) -> float:
        """Energy so far, a resumed run's earlier part included. Call it every few minutes: RAPL wraps.

        latest: also where a reading takes half a second (codecarbon), which is else made now and then.
        """
        if self._end:
            return self._end[1]
        with self._lock:
            here = time.monotonic() - self._start
            if self._tracker is not None:
                if latest or time.monotonic() - self._tracker_read > READ_EVERY / 2:
                    self._tracker_joules += 3.6e6 * float(self._tracker.stop_task().energy_consumed)
                    self._tracker.start_task()
                    self._tracker_read = time.monotonic()
                return self.joules_before + self._tracker_joules
            if self.watts is not None:
                watts = self._gpus[2] if self._gpus else float(self.watts)
                return self.joules_before + watts * here
            for i, package in enumerate(self._rapl):
                now = int((package / "energy_uj").read_text())
                step = now - self._rapl_last[i]
                if step < 0:  # the counter wrapped round
                    step += int((package / "max_energy_range_uj").read_text())
                self._rapl_joules += step / 1e6
                self._rapl_last[i] = now
            joules = self._rapl_joules
            if self._nvml is not None:
                joules += (sum(_nvml_energy(self._nvml)) - sum(self._nvml_start)) / 1e3  # millijoules
            if not self._rapl:  # the CPU's share is never nothing
                joules += WATTS_PER_CORE * (self.cores or 1) * here
            return self.joules_before + joules

    def report(self) -> dict[str, Any]:
        """For the manifest: hours, watts (mean), what they are from, gpus and hardware, kwh (PUE included),
        region and its electricity, kg_co2e, formula."""
        joules, hours = self.joules(latest=True), self.seconds() / 3600.0
        watts = joules / (hours * 3600.0) if hours > 0 else 0.0
        assert self.region is not None and self.pue is not None
        published = grid(self.region) if self.kg_per_kwh is None else None
        kg_per_kwh = published.kg_per_kwh if published else float(self.kg_per_kwh or 0.0)
        kwh, kg = footprint(hours, watts, kg_per_kwh, self.pue)
        count = self._gpus[0] if self._gpus else len(self._nvml_names)
        return {
            "hours": hours,
            "gpus": count,
            "hardware": self._hardware(),
            "watts": watts,
            "watts_source": self.source,
            "watts_assumed": self.assumed,
            "pue": self.pue,
            "kwh": kwh,
            "region": self.region,
            "kg_per_kwh": kg_per_kwh,
            "intensity_source": f"{published.source}, {published.year}" if published else "given",
            "kg_co2e": kg,
            "formula": FORMULA,
        }

    def _hardware(self) -> str:
        if self._gpus:
            return f"{self._gpus[0]} x {self._gpus[1]}"
        if self._nvml_names:
            kinds = dict.fromkeys(self._nvml_names)
            return ", ".join(f"{self._nvml_names.count(kind)} x {kind}" for kind in kinds)
        return f"{self.cores} cores of {_processor()}"

    def _read(self) -> None:
        while not self._ended.wait(READ_EVERY):
            with contextlib.suppress(OSError, SeavlmError):  # a full disk is told at the end, if still full
                self._note(self._others)

    def _note(self, others: dict[str, Any]) -> None:
        """Reads the counters, and keeps what they say for a run that goes on after this one was killed."""
        so_far = {"seconds": self.seconds(), "joules": self.joules()}
        if self.kept is not None and self.kept.parent.is_dir():
            manifest.write_json(self.kept, {**others, self.identity: so_far})

    def _go_on(self, kept: Path) -> None:
        self.seconds_before = self.joules_before = 0.0
        try:
            self._others = dict(json.loads(kept.read_text(encoding="utf-8")))
            before = self._others.pop(self.identity)
            self.seconds_before, self.joules_before = float(before["seconds"]), float(before["joules"])
        except (OSError, ValueError, KeyError, TypeError):
            return


def _codecarbon() -> Any:
    """A tracker that asks no network and writes no file, with a task begun: the energy is read as tasks."""
    try:
        trackers = importlib.import_module(CODECARBON)
    except ImportError:
        raise SeavlmError("codecarbon is not installed", hint="pip install 'seavlm[carbon]'.") from None
    logging.getLogger(CODECARBON).setLevel(logging.ERROR)
    tracker = trackers.OfflineEmissionsTracker(
        country_iso_code="SGP",  # for its own estimate of carbon, which is not used: the energy is
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    tracker.start_task()
    return tracker


def _rapl_packages(root: Path = Path("/sys/class/powercap")) -> list[Path]:
    """The readable RAPL packages (intel-rapl:0, intel-rapl:1; the sub-zones are parts of them)."""
    found = []
    for package in sorted(root.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") != 1:
            continue
        try:
            int((package / "energy_uj").read_text())
            int((package / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        found.append(package)
    return found


def _nvml_counters() -> tuple[Any, list[int], list[str]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in _handles(pynvml)]
        return (pynvml, _nvml_energy(pynvml), names) if names else (None, [], [])
    except Exception:  # no driver, no GPU, no package: nothing to measure
        return None, [], []


def _nvml_energy(nvml: Any) -> list[int]:
    """Millijoules since the driver was loaded, for each GPU."""
    return [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in _handles(nvml)]


def _handles(nvml: Any) -> list[Any]:
    """Of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else nvml.nvmlDeviceGetHandleByUUID(word)
        for word in (part.strip() for part in visible.split(","))
        if word
    ]


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return re.sub(r"\((R|TM)\)", "", line.partition(":")[2]).strip()
    return "the machine's processor"
