"""The page that Prometheus reads, and the pictures and alerts that are drawn from it."""

import asyncio
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import ServeConfig
from rayloop.metrics import BATCH_BUCKETS_ROWS, LATENCY_BUCKETS_MS, METRICS
from rayloop.serve.assemble import make_service
from rayloop.serve.exposition import CONTENT_TYPE, exposition
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.repository import Repository
from rayloop.serve.shadow.shadow import Shadow
from rayloop.serve.snapshot import snapshot as real_snapshot
from rayloop.serve.status import status_tables
from rayloop.serve.traffic.follow import PlanFollower
from tests.unit.serve_snapshots import busy, snapshot, variant, version

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SERIES = {series for metric in METRICS for series in metric.series}


def samples(page: bytes) -> dict[tuple[str, frozenset], float]:
    """All samples of a page; counters end in `_total`, as the parser has them."""
    found = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    ]
    assert max(Counter(key for key, _ in found).values(), default=1) == 1
    return dict(found)


def value(page: bytes, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    wanted = set(labels.items())
    chosen = [
        number
        for (known, have), number in samples(page).items()
        if known == name and wanted <= have
    ]
    assert chosen, f"{name} {labels} is not there"
    return math.fsum(chosen)


def test_the_page_says_what_it_is() -> None:
    assert CONTENT_TYPE == b"text/plain; version=0.0.4; charset=utf-8"
    assert exposition([]) == b""


def test_every_metric_is_on_the_page_as_documented() -> None:
    page = exposition([busy()])
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 35
    for metric in METRICS:
        assert metric.help.endswith(".")
        assert f"# HELP {metric.name} {metric.help}\n" in page.decode()
        assert f"# TYPE {metric.name} {metric.kind}\n" in page.decode()
    labels = {metric.name.removesuffix("_total"): set(metric.labels) for metric in METRICS}
    families = list(text_string_to_metric_families(page.decode()))
    assert len(families) == len(METRICS)
    for family in families:
        assert family.samples
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[family.name], sample


@given(
    st.lists(st.sampled_from(LATENCY_BUCKETS_MS) | st.floats(0.0, 60_000.0)),
    st.lists(st.integers(1, 600)),
)
def test_buckets_are_cumulative_and_end_with_everything(latencies_ms, batches) -> None:
    page = exposition(
        [
            snapshot(
                variants=[variant("champion", "11", 1.0, latencies_ms)],
                versions=[version("11", "live", batches)],
            )
        ]
    )
    for name, limits, found in (
        ("rayloop_request_latency_ms", LATENCY_BUCKETS_MS, latencies_ms),
        ("rayloop_batch_rows", BATCH_BUCKETS_ROWS, batches),
    ):
        for limit in (*limits, math.inf):
            text = "+Inf" if limit == math.inf else str(limit)
            below = sum(number <= limit for number in found)
            assert value(page, f"{name}_bucket", le=text) == below
        assert value(page, f"{name}_count") == len(found)
        assert value(page, f"{name}_sum") == pytest.approx(math.fsum(found))


def test_counts_are_those_of_the_snapshots() -> None:
    page = exposition([busy("one", 1), busy("two", 2)])
    assert value(page, "rayloop_replicas", model="classifier") == 2
    assert value(page, "rayloop_ready") == 2
    assert value(page, "nv_inference_request_success_total") == 3 * 101
    assert value(page, "nv_inference_request_success_total", replica="one", version="11") == 91
    assert value(page, "nv_inference_request_success_total", variant="challenger") == 30
    assert value(page, "nv_inference_request_failure_total", reason="REJECTED") == 18
    assert value(page, "nv_inference_request_failure_total", reason="CANCELED") == 0
    assert value(page, "nv_inference_count_total", version="11") == 3 * 43
    assert value(page, "nv_inference_exec_count_total", version="11") == 9
    assert value(page, "nv_inference_request_duration_us_total", version="12") == 3 * 4_000
    assert value(page, "nv_inference_queue_duration_us_total", version="12") == 3 * 1_000
    assert value(page, "nv_inference_compute_input_duration_us_total", version="12") == 3 * 2
    assert value(page, "nv_inference_compute_infer_duration_us_total", version="12") == 3 * 4_000
    assert value(page, "nv_inference_compute_output_duration_us_total", version="12") == 3 * 6
    assert value(page, "nv_inference_pending_request_count", replica="two", version="12") == 2
    assert value(page, "rayloop_decisions_total", decision="review") == 18
    assert value(page, "rayloop_decisions_total", variant="challenger", decision="fallback") == 0
    assert value(page, "rayloop_forced_requests_total", replica="two") == 22
    assert value(page, "rayloop_refused_requests_total", status="429") == 6
    assert value(page, "rayloop_refused_requests_total", status="413") == 0
    assert value(page, "rayloop_traffic_share", replica="one") == 1.0
    assert value(page, "rayloop_version_loaded", role="fallback", version="13") == 2
    assert value(page, "rayloop_shadow_agreed_rows_total") == 147
    assert value(page, "rayloop_events_written_rows_total", replica="two") == 180


@given(st.integers(0, 3), st.integers(0, 3))
def test_counters_only_grow(turns, more) -> None:
    before, after = (
        samples(exposition([busy("one", turns)])),
        samples(exposition([busy("one", turns + more)])),
    )
    assert before.keys() <= after.keys()
    counting = ("_total", "_bucket", "_sum", "_count")
    growing = [key for key in before if key[0].endswith(counting)]
    assert all(before[key] <= after[key] for key in growing)
    assert more == 0 or any(before[key] < after[key] for key in growing)


def test_a_replica_told_of_twice_is_there_once() -> None:
    assert samples(exposition([busy(turns=1), busy(turns=2)])) == samples(
        exposition([busy(turns=2)])
    )


def test_what_a_replica_does_not_have_is_left_out() -> None:
    page = exposition([snapshot()]).decode()
    assert "rayloop_events" not in page
    assert "rayloop_shadow" not in page
    assert "rayloop_refused" not in page
    assert 'rayloop_ready{model="classifier",replica="replica-1"} 1.0' in page


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1))
def test_any_name_survives_the_page(replica) -> None:
    found = samples(exposition([snapshot(replica)]))
    assert ("rayloop_ready", frozenset({("replica", replica), ("model", "classifier")})) in found


class AlwaysFirst:
    """Says the first class of every image, as an engine and as a shadow."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        return np.tile(np.float32([0.9, 0.1]), (len(images), 1))

    def warm(self, batch_sizes) -> None: ...

    def stop(self) -> None: ...


def test_a_real_replica_is_told_of() -> None:
    spec = ModelSpec(model="classifier", version="7", shape=(2, 2, 1), class_names=("low", "high"))
    images = np.zeros((3, 2, 2, 1), np.uint8)

    async def main() -> list[dict]:
        service = make_service(AlwaysFirst(), spec, ServeConfig())
        follower = PlanFollower(service, Repository(service), 1.0, SYSTEM_CLOCK)
        service.shadows["8"] = Shadow(
            "8", AlwaysFirst, SYSTEM_CLOCK, max_batch_rows=4, max_pending_rows=8
        )
        told = [real_snapshot(service, follower, "replica-1")]
        await service.predict(images, unit="", forced="", timeout_s=5)
        await service.predict(images, unit="", forced="", timeout_s=5, version="7")
        with pytest.raises(Exception, match="deadline"):
            await service.predict(images, unit="", forced="", timeout_s=0)
        told.append(real_snapshot(service, follower, "replica-1"))
        await service.close()
        return told

    before, after = asyncio.run(main())
    page = exposition([after])
    assert value(page, "nv_inference_request_success_total", version="7") == 2
    assert value(page, "rayloop_forced_requests_total", version="7") == 1
    assert value(page, "nv_inference_request_failure_total", reason="REJECTED") == 1
    assert value(page, "nv_inference_count_total") == 6
    assert value(page, "rayloop_decisions_total", decision="accept") == 6
    assert value(page, "rayloop_batch_rows_sum") == 6
    assert value(page, "rayloop_shadow_pending_rows", version="8") >= 0
    assert value(page, "rayloop_expired_requests_total") == 1
    tables = status_tables([before], [after], 2.0)
    rows = tables["variants"]
    assert (rows[0]["variant"], rows[0]["planned_share"], rows[0]["measured_share"]) == (
        "champion", 1.0, 1.0,
    )  # fmt: skip
    assert sum(row["requests_per_s"] for row in rows) == 1.5
    assert rows[0]["error_share"] > 0
    assert tables["shadows"][0]["version"] == "8"


def names_in(expression: str) -> set[str]:
    """Every name in a query that could be a metric's: no label, function or keyword."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', " ", expression)
    bare = re.sub(r"\b(by|ignoring|on|group_left|group_right|without)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"\b[a-z_]\w*\b(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "sum", "max", "min", "count", "avg"}


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *(rule["expr"] for rule in RULES)])
def test_queries_use_metrics_that_exist(expression) -> None:
    names = names_in(expression)
    assert names
    assert {name for name in names if not name.startswith("haproxy_")} <= SERIES


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_in_a_picture(metric) -> None:
    unseen = {"nv_inference_request_duration_us", "nv_inference_pending_request_count"}
    """Triton's dashboards want them; the histogram and the rows say more."""
    shown = set().union(*map(names_in, EXPRESSIONS))
    assert shown & set(metric.series) or metric.name in unseen


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["id"] is None
    source, model = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "DS_PROMETHEUS", "datasource", "prometheus",
    )  # fmt: skip
    assert model["query"]["query"] == "label_values(rayloop_ready, model)"
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_picture_says_what_it_shows(panel) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"]["uid"] == "${DS_PROMETHEUS}"
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] and target["legendFormat"]


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 9


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert all(text.strip().endswith(".") for text in rule["annotations"].values())


def test_the_example_scrapes_both_and_loads_the_rules() -> None:
    example = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert example["rule_files"] == ["alerts.yaml"]
    assert [job["job_name"] for job in example["scrape_configs"]] == ["rayloop", "haproxy"]
    assert example["scrape_configs"][0]["metrics_path"] == "/metrics"
