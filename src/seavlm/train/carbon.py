"""Energy and carbon of a run (Lacoste et al. 2019, "Quantifying the Carbon Emissions of Machine Learning"):

    kWh   = watts x hours / 1000
    kgCO2e = kWh x carbon intensity of the region's electricity

Watts are measured where the machine lets us (Intel/AMD RAPL counters, NVIDIA NVML), else assumed: the result
says which. No data-centre overhead (PUE) and no hardware manufacture are added.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seavlm.errors import SeavlmError, nearest

# kg CO2e per kWh of electricity generated: (value, year). Ember and Energy Institute, yearly electricity
# data, as processed by Our World in Data (grapher "carbon-intensity-electricity"); Singapore from its Energy
# Market Authority's average operating margin grid emission factor.
INTENSITY: dict[str, tuple[float, int]] = {
    "singapore": (0.4168, 2022),
    "brunei": (0.8939, 2022),
    "cambodia": (0.4177, 2022),
    "indonesia": (0.6759, 2022),
    "laos": (0.2655, 2022),
    "malaysia": (0.6058, 2022),
    "myanmar": (0.3989, 2023),
    "philippines": (0.6107, 2023),
    "thailand": (0.5496, 2023),
    "timor-leste": (0.6667, 2022),
    "vietnam": (0.4754, 2023),
    "china": (0.5823, 2023),
    "india": (0.7134, 2023),
    "taiwan": (0.6424, 2023),
    "united-states": (0.3695, 2023),
    "world": (0.4808, 2023),
}

# Assumed when nothing is measured and the recipe gives no watts: a busy core of a server with its share of
# the memory and the power supply. A 64-core server drawing 600-700 W comes to about ten watts a core.
WATTS_PER_CORE = 10.0


def intensity(region: str) -> float:
    """kg CO2e per kWh of a region's electricity; SeavlmError with the nearest names for an unknown one."""
    key = region.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in INTENSITY:
        raise SeavlmError(
            f"no carbon intensity is known for region {region!r}",
            hint=f"Known: {', '.join(INTENSITY)}.{nearest(key, INTENSITY)}",
        )
    return INTENSITY[key][0]


def footprint(hours: float, watts: float, kg_per_kwh: float) -> tuple[float, float]:
    """(kWh, kgCO2e) of `hours` at `watts` (the whole machine's, all devices together)."""
    kwh = watts * hours / 1000.0
    return kwh, kwh * kg_per_kwh


@dataclass
class Meter:
    """Watches a run: `start()`, then `joules()` and `report()` at any time.

    `watts` fixes the power (assumed); without it RAPL and NVML are read, and where neither can be, `cores` x
    WATTS_PER_CORE is assumed; `gpus` says whether the GPUs' energy belongs to the run. `kg_per_kwh` replaces
    the region's published intensity. `seconds_before` and `joules_before` carry the part of a resumed run
    that went before.
    """

    region: str = "singapore"
    watts: float | None = None
    kg_per_kwh: float | None = None
    cores: int = 1
    gpus: bool = False
    seconds_before: float = 0.0
    joules_before: float = 0.0
    _start: float = field(default=0.0, repr=False)
    _rapl: list[Path] = field(default_factory=list, repr=False)
    _rapl_last: list[int] = field(default_factory=list, repr=False)
    _rapl_joules: float = field(default=0.0, repr=False)
    _nvml: Any = field(default=None, repr=False)
    _nvml_start: list[int] = field(default_factory=list, repr=False)

    def start(self) -> Meter:
        if self.kg_per_kwh is None:  # an unknown region is an error now, not after the run
            self.kg_per_kwh = intensity(self.region)
        self._start = time.monotonic()
        if self.watts is None:
            self._rapl = _rapl_packages()
            self._rapl_last = [int((p / "energy_uj").read_text()) for p in self._rapl]
            if self.gpus:
                self._nvml, self._nvml_start = _nvml_counters()
        return self

    @property
    def source(self) -> str:
        if self.watts is not None:
            return "given"
        measured = [name for name, on in (("RAPL", self._rapl), ("NVML", self._nvml)) if on]
        return "+".join(measured) if measured else "assumed"

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._start

    def joules(self) -> float:
        """Energy so far, a resumed run's earlier part included. Call it every few minutes: RAPL wraps."""
        here = time.monotonic() - self._start
        if self.watts is not None:
            return self.joules_before + self.watts * here
        for i, package in enumerate(self._rapl):
            now = int((package / "energy_uj").read_text())
            step = now - self._rapl_last[i]
            if step < 0:  # the counter wrapped round
                step += int((package / "max_energy_range_uj").read_text())
            self._rapl_joules += step / 1e6
            self._rapl_last[i] = now
        joules = self._rapl_joules
        if self._nvml is not None:
            joules += sum(_nvml_energy(self._nvml)) / 1e3 - sum(self._nvml_start) / 1e3  # millijoules
        if not self._rapl:  # the CPU's share is never nothing
            joules += WATTS_PER_CORE * self.cores * here
        return self.joules_before + joules

    def report(self) -> dict[str, Any]:
        """For the manifest: hours, watts (mean), watts_source, kwh, region, kg_per_kwh, kg_co2e, formula."""
        joules, hours = self.joules(), self.seconds() / 3600.0
        watts = joules / (hours * 3600.0) if hours > 0 else 0.0
        kg_per_kwh = intensity(self.region) if self.kg_per_kwh is None else self.kg_per_kwh
        kwh, kg = footprint(hours, watts, kg_per_kwh)
        return {
            "hours": hours,
            "watts": watts,
            "watts_source": self.source,
            "kwh": kwh,
            "region": self.region,
            "kg_per_kwh": kg_per_kwh,
            "kg_co2e": kg,
            "formula": "hours x watts / 1000 x kg per kWh (Lacoste et al. 2019)",
        }


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


def _nvml_counters() -> tuple[Any, list[int]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return (pynvml, _nvml_energy(pynvml)) if pynvml.nvmlDeviceGetCount() else (None, [])
    except Exception:  # no driver, no GPU, no package: nothing to measure
        return None, []


def _nvml_energy(nvml: Any) -> list[int]:
    """Millijoules since the driver was loaded, for each GPU."""
    return [
        nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(i))
        for i in range(nvml.nvmlDeviceGetCount())
    ]
