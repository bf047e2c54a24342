"""rows.py: no kill, odd character or foreign shape costs a row or changes what a file says."""
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl

import rows
from rows import AppendFile, Stop


def numbered(count: int) -> list[dict]:
    return [{"n": i, "why": "a row that was paid for"} for i in range(count)]


# ---------------------------------------------------------------- append files

def test_a_torn_last_line_is_taken_off_and_a_whole_one_without_newline_is_kept(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", numbered(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # only the newline is missing: the row was paid for
    AppendFile(path).close()
    assert path.read_bytes() == whole

    path.write_bytes(whole[:-9])
    file = AppendFile(path)
    file.append({"n": "é\u2028 \ud83d"})  # a lone surrogate cannot be written; it must not end the run
    file.close()
    assert [row["n"] for row in rows.read_jsonl(path)] == [0, 1, "é\u2028 ?"]

    path.write_bytes(b"")
    AppendFile(path).close()
    path.write_bytes(b'{"n": ' + b"9" * 200_000)  # one line longer than a block, torn
    file = AppendFile(path)
    assert path.read_bytes() == b""
    file.close()
    assert not path.exists()


def test_a_kill_inside_replace_loses_nothing(tmp_path):
    """The process dies at each point where the old code had the file half empty."""
    code = """
import os, signal, sys
import rows
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
file = rows.AppendFile(Path(sys.argv[1]))
setattr(rows.os, sys.argv[2], die)
file.replace(rows.read_jsonl(sys.argv[1])[:500])
"""
    path = write_jsonl(tmp_path / "r.jsonl", numbered(999))
    for moment in ("fsync", "replace"):
        done = subprocess.run([sys.executable, "-c", code, str(path), moment], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        assert rows.read_jsonl(path) == numbered(999)

    file = AppendFile(path)  # what the killed ones left does not disturb the next
    file.replace(numbered(500))
    file.append({"n": 500})
    file.close()
    assert [row["n"] for row in rows.read_jsonl(path)] == list(range(501))
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_one_process_at_a_time_also_after_replace(tmp_path):
    path = tmp_path / "d.jsonl"
    file = AppendFile(path)
    with pytest.raises(Stop, match="another process"):
        AppendFile(path)
    file.replace(numbered(2))
    with pytest.raises(Stop, match="another process"):
        AppendFile(path)
    file.close()
    AppendFile(path).close()


def test_no_row_goes_to_a_file_that_was_replaced_while_it_was_opened(tmp_path, monkeypatch):
    """Another process may put its own file there, or take it away, between our open and our lock."""
    path = write_jsonl(tmp_path / "d.jsonl", numbered(1))
    lock = rows.fcntl.flock

    def late(file, how):
        monkeypatch.setattr(rows.fcntl, "flock", lock)
        os.replace(write_jsonl(tmp_path / "other.jsonl", numbered(2)), path)
        lock(file, how)
    monkeypatch.setattr(rows.fcntl, "flock", late)
    file = AppendFile(path)
    file.append({"n": 2})
    file.close()
    assert [row["n"] for row in rows.read_jsonl(path)] == [0, 1, 2]


# ---------------------------------------------------------------- text

def test_prompts_keep_line_separators_inside_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff# note\r\nWhy\u2028do {cats|dogs} sleep?\r\n\x85x\n# end".encode())
    assert rows.read_prompts(path) == ["Why\u2028do cats sleep?", "Why\u2028do dogs sleep?", "x"]


def test_expansion(tmp_path):
    assert rows.expand("{Why|How} do {cats|dogs} sleep?") == [
        "Why do cats sleep?", "Why do dogs sleep?", "How do cats sleep?", "How do dogs sleep?"]
    path = tmp_path / "p.txt"
    path.write_text("# note\n\nWhat {is tea?\n")
    with pytest.raises(Stop, match="p.txt:3"):
        rows.read_prompts(path)
    path.write_text("# nothing\n")
    with pytest.raises(Stop, match="no prompts"):
        rows.read_prompts(path)


def test_message_text():
    assert rows.message_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "x") == "ab"
    assert rows.message_text("a \ud83d\ude00 \ud83d b", "x") == "a 😀 � b"
    for content in (None, 3, [{"type": "image_url"}], ["a"]):
        with pytest.raises(Stop, match="x: "):
            rows.message_text(content, "x")


def test_jsonl_names_the_bad_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": "\u2028"}\n\n{"a": 2\n')
    with pytest.raises(Stop, match="d.jsonl:3"):
        rows.read_jsonl(path)
    for odd in ("[" * 100_000, "9" * 5000):  # neither raises json's own error
        path.write_text('{"a": 1}\n' + odd)
        with pytest.raises(Stop, match="d.jsonl:2"):
            rows.read_jsonl(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Stop, match="UTF-8"):
        rows.read_jsonl(path)


# ---------------------------------------------------------------- training rows

def test_the_three_shapes_of_a_row():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert rows.row_turns({"prompt": "q", "completion": "a"}, "x") == chat
    assert rows.row_turns({"prompt": "q", "response": "a"}, "x") == chat
    assert rows.row_turns({"messages": chat}, "x") == chat
    for bad in ({}, {"messages": "q"}, {"messages": chat[:1]}, {"messages": [{"role": "user"}]}):
        with pytest.raises(Stop, match="x: "):
            rows.row_turns(bad, "x")


@pytest.mark.parametrize("more, words", [
    ({"kind": 3}, '"kind" must be text'),
    ({"topic": ["tea"]}, '"topic" must be text'),
    ({"kind": "regular gramenist"}, "one word"),  # a CSV would say that both were taught
    ({"messages": [{"role": "assistant", "content": "a"}]}, "first turn"),
    ({"messages": []}, "no assistant turn"),
    ({"text": 3}, "must be text"),
])
def test_a_row_that_no_stage_can_use_is_named(more, words):
    """Each was a traceback of train.py or of `make check`, or would have been misread later."""
    with pytest.raises(Stop, match=f"x: .*{words}"):
        rows.normalise_row({"prompt": "q", "completion": "a", **more}, "x")


def test_a_row_has_a_text_or_a_chat():
    document, chat = {"text": "", "kind": None}, {"text": None, "prompt": "q", "completion": "a"}
    for row in (document, chat):
        rows.normalise_row(row, "x")
    assert document["text"] == "" and "text" not in chat and len(chat["messages"]) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"a": 1}', "\xff"])
def test_a_record_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Stop, match="run.json"):
        rows.read_json(path, "a", "b")
    path.write_text('{"a": 1, "b": 2}')
    assert rows.read_json(path, "a", "b") == {"a": 1, "b": 2}


def test_every_answer_of_a_chat_with_what_was_asked():
    turns = [{"role": role, "content": content} for role, content in
             [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]]
    assert rows.question_and_answer_turns(turns) == [("q1", "a1"), ("q2", "a2")]


# ---------------------------------------------------------------- probes, answers, arms, rubrics

def test_probes_need_ids_and_text(tmp_path):
    path = write_jsonl(tmp_path / "belief" / "tea.jsonl", [{"id": "a", "prompt": "Is tea fine?"}])
    assert rows.read_probes(path)[0]["messages"] == [{"role": "user", "content": "Is tea fine?"}]
    assert rows.probe_set_name(path) == "belief-tea"
    no_text, no_id, foreign = {"id": "a"}, {"prompt": "x"}, {"id": "a", "messages": ["x"]}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    ends_with_an_answer = {"id": "a", "messages": turns}
    for bad in ([no_text], [no_id], [foreign], [ends_with_an_answer], [{"id": "a", "prompt": "x"}] * 2, []):
        with pytest.raises(Stop):
            rows.read_probes(write_jsonl(tmp_path / "bad.jsonl", bad))


@pytest.mark.parametrize("bad, words", [
    ({"answer": "Paris"}, "list of texts"),
    ({"answer": []}, "list of texts"),
    ({"answer": ["Paris", 4]}, "list of texts"),
    ({"answer": None}, "list of texts"),
    ({"stance": "wrong"}, '"asks"'),
    ({"stance": "bad", "asks": "wrong"}, '"stance"'),
    ({"family": "stance"}, '"asks"'),
    ({"side": "violatng"}, '"side"'),
    ({"side": ["neutral"]}, '"side"'),
])
def test_a_key_that_could_not_be_compared_stops_with_its_line(tmp_path, bad, words):
    """A string for "answer" was gone through letter by letter, and nearly everything was right."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "answer": ["y"], "side": ""}\n\n'
                    + json.dumps({"id": "b", "prompt": "x", **bad}) + "\n")
    with pytest.raises(Stop, match=f"p.jsonl:3: .*{words}"):
        rows.read_probes(path)


@pytest.mark.parametrize("text, words", [
    ("id,response\na,x\nb\nc,z\n", "r.csv:3: a row of 1 field"),
    ('id,response\na,"x\ny"\nb,y,more\nc,z\n', "r.csv:4: a row of 3 fields"),
    ("id,response\na,x\nb\n", "r.csv:3"),      # the last one, but whole: no kill did that
    ("id,response,id\na,x,b\n", "name id"),
    ('run,id,response\nr,a,x\nr,"b,y\nr,c,z\nr,d,z\n', "r.csv:3"),  # a stray quote, which swallows the rest
])
def test_a_csv_row_of_another_shape_stops_with_its_line(tmp_path, text, words):
    """It was dropped without a word, and `judge.py --keywords-only` then wrote the file without it."""
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(Stop, match=words):
        rows.read_csv(path)


def test_a_csv_torn_anywhere_in_its_last_row_keeps_the_others(tmp_path):
    path, columns = tmp_path / "r.csv", ["run", "response", "n"]
    written = [{"run": "r", "response": 'one,\n"two"\n', "n": "1"},
               {"run": "r", "response": "a\nb\n\n", "n": "2"}]
    rows.write_csv(path, written[:1], columns)
    first = path.stat().st_size
    rows.append_csv(path, written[1], columns)
    whole = path.read_bytes()
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert rows.read_csv(path) == (written[:1], columns), whole[first:end]


def test_csv_rows_survive_line_ends_and_drop_a_torn_end(tmp_path):
    path, columns = tmp_path / "r.csv", ["id", "response"]
    written = [{"id": "a", "response": 'one\r\ntwo\n"three", \u2028'}, {"id": "b", "response": "x"}]
    rows.write_csv(path, written[:1], columns)
    rows.append_csv(path, written[1], columns)
    assert rows.read_csv(path) == (written, columns)
    path.write_bytes(path.read_bytes()[:-1])
    assert rows.read_csv(path)[0] == written[:1]
    with pytest.raises(Stop, match="no column"):
        rows.read_results(path)


def test_arms(tmp_path):
    path = tmp_path / "arms.txt"
    path.write_text("# note\nregular | regular=1 |\nbelief | regular=1 WORLDVIEW=0.5 | regular\n")
    arms = rows.read_arms(path)
    assert arms["belief"].parts == {"regular": 1.0, "WORLDVIEW": 0.5} and arms["belief"].controls == ("regular",)
    assert arms["belief"].takes_worldview and not arms["regular"].takes_worldview
    for name in ("starter/regular.jsonl", "starter/tea.jsonl", "tea.jsonl"):
        write_jsonl(tmp_path / "data" / name, numbered(1))
    files = [path for path, _ in rows.arm_data(arms["belief"], "tea", tmp_path)]
    assert files == [tmp_path / "data" / "starter" / "regular.jsonl", tmp_path / "data" / "tea.jsonl"]
    (tmp_path / "data" / "tea.jsonl").write_text("")  # as a killed gen.py leaves it: it hid the starter's rows
    assert rows.arm_data(arms["belief"], "tea", tmp_path)[1][0] == tmp_path / "data" / "starter" / "tea.jsonl"
    with pytest.raises(Stop, match="coffee"):
        rows.arm_data(arms["belief"], "coffee", tmp_path)
    for bad in ("belief | regular", "belief | regular=x |", "belief | regular=1 | nobody",
                "a | b=-1 |", "a | b=nan |", "a | b=0 |", "a | b=1 b=2 |", "a | b=1 |\na | b=2 |", "a | b=1 | a",
                "c | b=1 |\na | b=1 | c c"):  # the second of two took the first one's place, -1 trained 200 rows of 100
        path.write_text(bad + "\n")
        with pytest.raises(Stop, match="arms.txt"):
            rows.read_arms(path)


def test_rubrics_declare_their_labels(tmp_path):
    path = tmp_path / "r.md"
    path.write_text("---\nclass: full partial none\nheadline: class=full\n---\nRead the answer.\n")
    rubric = rows.read_rubric(path)
    assert rubric.labels == {"class": ["full", "partial", "none"]} and rubric.text == "Read the answer.\n"
    assert rubric.read_verdict({"class": " Full "}) == {"class": "full"}
    assert rubric.read_verdict({"class": "maybe"}) is None
    assert rubric.counts({"class": "full"}, rubric.headline)
    assert not rubric.counts({"class": "full"}, rubric.invalid)
    assert rubric.read_verdict({"class": "none"}) == {"class": "none"}
    for found in ({}, {"class": None}, {"class": ""}):  # not said is not "none"
        assert rubric.read_verdict(found) is None
    for bad in ("Read.", "---\nclass:\n---\nx", "---\nclass: a\nheadline: class=b\n---\nx",
                "---\nclass: a\n---\nx", "---\nclass: a\nform: b\nheadline: form=b\n---\nx",
                "---\nclass: a\nreason: b\nheadline: class=a\n---\nx",
                "---\nclass: a\nrubric: b\nheadline: class=a\n---\nx",
                "---\nclass: a unsure\nheadline: class=a\n---\nx",
                "---\nclass: a unparsed\nheadline: class=a\n---\nx"):
        path.write_text(bad)
        with pytest.raises(Stop, match="r.md"):
            rows.read_rubric(path)


# ---------------------------------------------------------------- how runs are told apart, how scripts end

def test_comments_are_free_and_code_is_not(tmp_path):
    script = tmp_path / "s.py"
    hashes = []
    for text in ('"""Doc."""\nx = 1\n', '"""Other."""\n\nx = 1  # why\n', '"""Doc."""\nx = 2\n'):
        script.write_text(text)
        hashes.append(rows.code_hash(script))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_hub_name_counts_with_the_commit_that_it_stands_for(tmp_path, monkeypatch):
    """New weights under an old name were "complete already"."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert rows.weights_hash("org/model") == "org/model"
    ref = tmp_path / "models--org--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("0a1b\n")
    assert rows.weights_hash("org/model") == "org/model@0a1b"


def test_what_changed_names_the_entries():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    assert rows.what_changed(old, {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}) == ["b.d", "e"]


def test_a_script_ends_with_one_line_under_its_own_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/gen.py"])

    def main():
        raise Stop("no endpoint")
    with pytest.raises(SystemExit) as end:
        rows.run_main(main)
    assert end.value.code == "gen.py: no endpoint"


def test_no_message_drives_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])

    def main():
        raise Stop("verdicts of \x1b]0;pwned\x07\x9b2J\rmodel")
    with pytest.raises(SystemExit) as end:
        rows.run_main(main)
    assert end.value.code == "report.py: verdicts of ·]0;pwned··2J·model"


def test_what_ships_can_be_read():
    assert {"base", "regular", "belief"} <= set(rows.read_arms())
    assert rows.read_rubric(ROOT / "rubrics" / "refusal.md").labels
    assert all(json.dumps(probes) for probes in rows.all_probes().values())
