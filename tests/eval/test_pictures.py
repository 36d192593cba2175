import re
import xml.etree.ElementTree as ET

from retrieval_kd.eval.pictures import costs_figure, headline_figure, pictures


def system(name: str, mean: float, costs: tuple[float, float] | None) -> dict:
    efficiency = costs and {"milliseconds_per_query": costs[0], "bytes_per_document": costs[1]}
    interval = {"low": mean - 0.05, "high": mean + 0.1}
    return {"name": name, "means": {"nDCG@10": mean}, "interval": interval, "efficiency": efficiency}


SYSTEMS = [system("bm25", 0.4, (1.0, 300.0)), system("run", 0.6, None), system("ivf", 0.5, (12.0, 24.0))]
METRICS = {"headline": "nDCG@10", "recipe": {"bootstrap": {"confidence": 0.95}}, "systems": SYSTEMS}


def test_the_headline_shows_each_mean_inside_its_interval():
    axes = headline_figure(METRICS).axes[0]
    lines = [line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    dots = [line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) == 1]
    assert lines == [[0.4 - 0.05, 0.5], [0.6 - 0.05, 0.7], [0.5 - 0.05, 0.6]]
    assert dots == [[0.4], [0.6], [0.5]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bm25", "run", "ivf"]
    assert [text.get_text() for text in axes.texts] == ["0.400", "0.600", "0.500"]
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 0.7


def test_the_costs_show_indexes_only_on_a_log_axis_when_they_are_far_apart():
    left, right = costs_figure(METRICS).axes
    assert [(line.get_xdata().item(), line.get_ydata().item()) for line in left.lines] == [(1.0, 0.4), (12.0, 0.5)]
    assert [line.get_xdata().item() for line in right.lines] == [300.0, 24.0]
    assert [line.get_label() for line in left.lines] == ["bm25", "ivf"]
    assert (left.get_xscale(), right.get_xscale()) == ("log", "log")
    near = METRICS | {"systems": [system("a", 0.4, (1.0, 5.0)), system("b", 0.4, (2.0, 5.0))]}
    assert [axes.get_xscale() for axes in costs_figure(near).axes] == ["linear", "linear"]


def test_svgs_are_whole_the_same_every_time_and_share_no_id():
    svgs = pictures(METRICS)
    assert svgs == pictures(METRICS)
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in svgs]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    for text, known in zip(svgs, ids, strict=True):
        ET.fromstring(text)
        assert set(re.findall(r'href="#([^"]+)"', text)) <= known
        assert set(re.findall(r"url\(#([^)]+)\)", text)) <= known


def test_without_costs_there_is_one_picture():
    assert len(pictures(METRICS | {"systems": [system("run", 0.0, None)]})) == 1
