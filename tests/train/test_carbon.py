"""Energy and carbon: the published figure comes out, counters wrap, resumed runs add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from seavlm.errors import SeavlmError
from seavlm.train import carbon


def test_the_published_27b_run() -> None:
    """13 hours of a node of 8 x H200 at about 620 W each, 0.419 kg/kWh: about 27 kg CO2e."""
    kwh, kg = carbon.footprint(hours=13, watts=8 * 620, kg_per_kwh=0.419)
    assert kwh == pytest.approx(64.48)
    assert kg == pytest.approx(27.0, abs=0.1)


def test_regions() -> None:
    assert carbon.intensity("Singapore") == pytest.approx(0.417, abs=0.005)
    assert carbon.intensity("timor leste") == carbon.intensity("timor-leste")
    assert all(0.0 < value < 1.0 and year > 2015 for value, year in carbon.INTENSITY.values())
    with pytest.raises(SeavlmError, match="vietnam"):
        carbon.intensity("viet nam")


def test_meter_with_given_watts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(carbon.time, "monotonic", lambda: now[0])
    meter = carbon.Meter(
        region="thailand", watts=500.0, seconds_before=1800.0, joules_before=900_000.0
    ).start()
    now[0] += 1800.0
    report = meter.report()
    assert report["hours"] == pytest.approx(1.0)
    assert report["kwh"] == pytest.approx(0.5)  # half by the part before the stop, half after
    assert report["kg_co2e"] == pytest.approx(0.5 * 0.5496)
    assert report["watts_source"] == "given"


def test_meter_reads_rapl_and_follows_its_wrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000\n")
    counter = package / "energy_uj"
    counter.write_text("9000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a sub-zone, part of the package
    packages = carbon._rapl_packages(tmp_path)
    assert packages == [package]
    monkeypatch.setattr(carbon, "_rapl_packages", lambda: packages)
    meter = carbon.Meter().start()
    counter.write_text("2000000\n")  # wrapped: 1 J to the top, 2 J after it
    assert meter.joules() == pytest.approx(3.0)
    counter.write_text("4000000\n")
    assert meter.joules() == pytest.approx(5.0)
    assert meter.source == "RAPL"


def test_meter_assumes_when_nothing_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(carbon.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(carbon, "_rapl_packages", lambda: [])
    meter = carbon.Meter(cores=4, kg_per_kwh=0.5).start()
    now[0] = 3600.0
    report = meter.report()
    assert report["watts"] == pytest.approx(4 * carbon.WATTS_PER_CORE)
    assert report["watts_source"] == "assumed"
    assert report["kg_co2e"] == pytest.approx(0.04 * 0.5)
