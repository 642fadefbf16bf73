"""Debian's promtool on the alert rules: each fires on what it is for, and on nothing else."""

from pathlib import Path

import pytest
import yaml

from tests.cluster.debian_prometheus import MONITORING, prometheus_programs, promtool

ALERTS = MONITORING / "alerts.yaml"


@pytest.fixture(scope="module")
def programs(request) -> dict[str, str]:
    return prometheus_programs(request.config.cache)


def test_promtool_refuses_a_broken_rule(programs, tmp_path) -> None:
    broken = tmp_path / "alerts.yaml"
    broken.write_text(ALERTS.read_text().replace("sum by (model) (", "sum by model (", 1))
    assert promtool(programs, "check", "rules", broken)[0] != 0


LABELS = 'model="classifier",replica="r1",version="11",variant="champion"'
SICK = {
    'rayloop_ready{model="classifier",replica="r1"}': "0x30",
    f"nv_inference_request_success{{{LABELS}}}": "0+90x30",
    f'nv_inference_request_failure{{{LABELS},reason="BACKEND"}}': "0+10x30",
    f'nv_inference_request_failure{{{LABELS},reason="REJECTED"}}': "0+60x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="500.0"}}': "0+80x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="1000.0"}}': "0+100x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="+Inf"}}': "0+100x30",
    'rayloop_pending_rows{model="classifier",replica="r1",version="11"}': "5+9x30",
    'rayloop_traffic_plan_refused{model="classifier",replica="r1"}': "8x30",
    'rayloop_traffic_plan{model="classifier",replica="r1"}': "7x30",
    'rayloop_traffic_plan{model="classifier",replica="r2"}': "8x30",
    'rayloop_shadow_compared_rows_total{model="classifier",replica="r1",version="14"}': "0+100x30",
    'rayloop_shadow_agreed_rows_total{model="classifier",replica="r1",version="14"}': "0+90x30",
    'rayloop_shadow_compared_rows_total{model="classifier",replica="r1",version="15"}': "3x30",
    'rayloop_shadow_dropped_rows_total{model="classifier",replica="r1",version="15"}': "0+9x30",
    'rayloop_shadow_restarts_total{model="classifier",replica="r1",version="16"}': "0+1x30",
    'rayloop_fallback_capped_rows_total{model="classifier",replica="r1"}': "0+9x30",
    'rayloop_events_dropped_rows_total{model="classifier",replica="r1"}': "0+9x30",
    'rayloop_events_failed_writes_total{model="classifier",replica="r1"}': "0+1x30",
}
"""One series a line, a value a minute, in which everything is wrong."""

WELL = {
    'rayloop_ready{model="classifier",replica="r1"}': "1x30",
    f"nv_inference_request_success{{{LABELS}}}": "0+9900x30",
    f'nv_inference_request_failure{{{LABELS},reason="BACKEND"}}': "0+1x30",
    f'nv_inference_request_failure{{{LABELS},reason="CANCELED"}}': "0+900x30",
    f'nv_inference_request_failure{{{LABELS},reason="REJECTED"}}': "0+2x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="500.0"}}': "0+9999x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="1000.0"}}': "0+10000x30",
    f'rayloop_request_latency_ms_bucket{{{LABELS},le="+Inf"}}': "0+10000x30",
    'rayloop_pending_rows{model="classifier",replica="r1",version="11"}': "0 8 0 16 0 32 0 64x23",
    'rayloop_traffic_plan_refused{model="classifier",replica="r1"}': "0x30",
    'rayloop_traffic_plan{model="classifier",replica="r1"}': "7x10 8x20",
    'rayloop_traffic_plan{model="classifier",replica="r2"}': "7x10 8x20",
    'rayloop_shadow_compared_rows_total{model="classifier",replica="r1",version="14"}': "0+100x30",
    'rayloop_shadow_agreed_rows_total{model="classifier",replica="r1",version="14"}': "0+99x30",
    'rayloop_shadow_dropped_rows_total{model="classifier",replica="r1",version="14"}': "0+900x30",
    'rayloop_shadow_restarts_total{model="classifier",replica="r1",version="14"}': "0 1x29",
    'rayloop_fallback_capped_rows_total{model="classifier",replica="r1"}': "5x30",
    'rayloop_events_dropped_rows_total{model="classifier",replica="r1"}': "5x30",
    'rayloop_events_failed_writes_total{model="classifier",replica="r1"}': "5x30",
}


def alert_names() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"]]


def firing_test(folder: Path, series: dict[str, str], firing: dict[str, int]) -> Path:
    """A test of promtool's that counts what fires of each alert after half an hour.

    Args:
        folder: Gets the file.
        series: What is scraped in that time.
        firing: How many of each alert; none of those that are not named.
    """
    queries = [
        {
            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
            "eval_time": "28m",
            "exp_samples": [{"labels": "{}", "value": firing[name]}] if name in firing else [],
        }
        for name in alert_names()
    ]
    document = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": queries,
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def test_every_alert_fires_on_what_it_is_for(programs, tmp_path) -> None:
    firing = dict.fromkeys(alert_names(), 1) | {"RayloopShadowDead": 2}
    code, said = promtool(programs, "test", "rules", firing_test(tmp_path, SICK, firing))
    assert code == 0, said


def test_no_alert_fires_on_what_is_well(programs, tmp_path) -> None:
    code, said = promtool(programs, "test", "rules", firing_test(tmp_path, WELL, {}))
    assert code == 0, said
    sick_ready = {**WELL, 'rayloop_ready{model="classifier",replica="r1"}': "1x5 0x25"}
    code, said = promtool(programs, "test", "rules", firing_test(tmp_path, sick_ready, {}))
    assert code != 0 and "RayloopNoReplicaReady" in said, said


def test_silence_is_no_health(programs, tmp_path) -> None:
    """An alert fires when nothing is scraped at all; its sentence holds without a label too."""
    expected = {
        "summary": "No replica answers for any model.",
        **{
            key: text
            for group in yaml.safe_load(ALERTS.read_text())["groups"]
            for rule in group["rules"]
            if rule["alert"] == "RayloopNoReplicaReady"
            for key, text in rule["annotations"].items()
            if key != "summary"
        },
    }
    document = {
        "rule_files": [str(ALERTS)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": "up", "values": "0x10"}],
                "alert_rule_test": [
                    {
                        "alertname": "RayloopNoReplicaReady",
                        "eval_time": "5m",
                        "exp_alerts": [
                            {"exp_labels": {"severity": "critical"}, "exp_annotations": expected}
                        ],
                    }
                ],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(document))
    code, said = promtool(programs, "test", "rules", file)
    assert code == 0, said
