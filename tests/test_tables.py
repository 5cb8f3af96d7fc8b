"Tables of other people: what can mean one thing only is read, everything else is one error that names file, column, row and value."
import codecs

import numpy as np
import pandas as pd
import pytest

from cvslab.core import numbers, read_table, words

TEXT = "id\tage\tcity\n1\t57\tZürich\n2\t89+\tPécs\n"
TABLE = dict(id=["1", "2"], age=["57", "89+"], city=["Zürich", "Pécs"])


def read(text, sep=None, coding="utf-8"): return read_table(text.encode(coding), "people.tsv", sep).to_dict("list")
def column(*values): return pd.DataFrame(dict(age=values), dtype=str)


@pytest.mark.parametrize("data", [
    TEXT.encode(), codecs.BOM_UTF8 + TEXT.encode(), 2 * codecs.BOM_UTF8 + TEXT.encode(), TEXT.encode("utf-16"),
    codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), TEXT.encode("utf-16-le"), TEXT.encode("utf-16-be"), TEXT.encode("utf-32"),
    TEXT.encode("cp1252"), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode(), TEXT.replace("\n", "\r\n").encode("utf-16"),
    TEXT.replace("\n", "\r\r\n").encode(), TEXT.rstrip("\n").encode(), TEXT.replace("\t", ",").encode(), TEXT.replace("\t", ";").encode("cp1252"),
    TEXT.replace("\t", " \t ").encode(), TEXT.replace("\t", "\u00a0\t").encode(), (TEXT + "\n\n").encode(), (TEXT + "\t\t\n \n").encode(),
    TEXT.replace("\n", "\t\n").encode(), TEXT.replace("Zürich\n", "Zürich\n\n").encode(), ("\n" + TEXT).encode(),
    TEXT.replace("age", '"age"').replace("57", '"57"').encode(), TEXT.replace("Pécs\n", "Pécs\t\t\n").encode()])
def test_one_table_in_many_clothes(data):
    table = read_table(data, "people.tsv")
    assert table.to_dict("list") == TABLE and table.index.tolist() == [0, 1]


def test_a_table_of_pandas_comes_back_as_it_was():
    odd = pd.DataFrame({"a b": ["NA", "", "1e5", "007", "x\ny", 'say "x"'], "c;d": ["nan", "None", "1_000", "TRUE", "a,b", "[0.1, 0.2]"]})
    for sep in ",;\t":
        assert read_table(odd.to_csv(index=False, sep=sep).encode(), "odd.csv", sep).equals(odd.astype(str))


def test_the_prescribed_separator_comes_first():
    assert list(read("size, mm\tage\n1,5\t2\n", "\t")) == ["size, mm", "age"]
    assert list(read('"size, mm";age\n1,5;2\n')) == ["size, mm", "age"]
    assert read("1\n2\n\n3\n", ",") == {"1": ["2", "3"]} and read("age\n") == dict(age=[])


@pytest.mark.parametrize("data, words", [
    (b"", "people.tsv is empty"), (b"\n \n\t\t\n", "people.tsv is empty"), (codecs.BOM_UTF8, "people.tsv is empty"), (b",,\n1,2,3\n", "people.tsv is empty"),
    (b"\r\0\x01\0", "control character"),
    (b"a\tb\n1\t2\n1\t2\t3\n", r"1 rows do not have the 2 values .* row 3 has 3: \['1', '2', '3'\]"),
    (b"a,b\n1\n1,2\n3\n", r"2 rows .* row 2 has 1"), (b"a;b\n1,2\n", "row 2 has 1"), (b"a,b,c\n1,2\n", "row 2 has 2"),
    (b"a,b\n1,2\n,,3\n", "row 3 has 3"), (b"sep=;\na;b\n1;2\n", "row 2 has 2"),
    (b"a,b,a\n1,2,3\n", "more than one column 'a'"), (b"a, b,b\n1,2,3\n", "more than one column 'b'"),
    (b"a;b,c\n1;2,3\n", "comma and semicolon stand in its first line"), (b"a\tb,c\n1\t2,3\n", "comma and tab"),
    (b"a,b\n1,\x81\n", r"byte 6 \(0x81\), in row 2"), (b"a,b\r\n1,2\r\n3,\xe4\x8d\r\n", r"byte 12 \(0xe4\), in row 3"),
    ("a,b\nZürich,".encode() + b"\xfc\n", r"byte 12 \(0xfc\), in row 2"), ("a,b\n1,ü".encode()[:-1] + "\nö,".encode(), r"\(0xc3\), in row 2"),
    (codecs.BOM_UTF8 + b"a,b\n1,\xfc\n", r"byte 9 is no UTF-8"), ("a,b\n1,2\n".encode("utf-16")[:-1], "no UTF-16"),
    (b"PK\x03\x04\x14\x00\x00\x00\x08\x00", "control character"), (b"\x1f\x8b\x08\x00abc", "0x8b|control character"), (b"a,b\n1,\x00\n", r"row 2, holds .*'\\x00'"),
    (b"a,b\n1,2\n3,\x07\n", "row 3, holds the control character"), ("a,b\n1,\u0085\n".encode(), "row 2, holds the control character"),
    (b'a,b\n1,"2\n3,4\n', "after row 1: .*quotation marks"), (b'a,b\n1,"2"3\n', "after row 1: .*quotation marks")])
def test_what_is_uncertain_is_refused_by_name(data, words):
    with pytest.raises(ValueError, match=words) as caught: read_table(data, "people.tsv")
    assert str(caught.value).startswith("people.tsv") and not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize("values, wanted, how", [
    (["57", "58", "5.5", ".5", "1e2", "-3", "+4", "007"], [57, 58, 5.5, .5, 100, -3, 4, 7], {}),
    (["57,5", "0,0026", "0,125", "1234,567", "12,3456"], [57.5, .0026, .125, 1234.567, 12.3456], {}),
    (["57", "n/a", "NA", "nan", "", "N/A", "<NA>", "Not reported", "-"], [57] + 8 * [np.nan], dict(missing=True)),
    (["89+", "> 89", ">=90", "<40", "≥ 89", "89 +", "57"], [89, 89, 90, 40, 89, 89, 57], dict(bounds=True)),
    (["128", "128.0", "1e2"], [128, 128, 100], dict(whole=True)), (["9007199254740991"], [2**53 - 1], dict(whole=True)), (["0", "120"], [0, 120], dict(low=0, high=120)),
    (["89+", "n/a", "57,5"], [89, np.nan, 57.5], dict(bounds=True, missing=True))])
def test_numbers_of_certain_meaning(values, wanted, how):
    found = numbers(column(*values), "age", "people.tsv", **how)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == ("int64" if how.get("whole") else "float64")


@pytest.mark.parametrize("value, how", [
    ("n/a", {}), ("", {}), ("nan", {}), ("89+", {}), (">89", {}), ("1,234", {}), ("12,345", {}), ("1,234.5", {}), ("1.234,5", {}), ("1,2,3", {}), ("1_000", {}),
    ("inf", {}), ("-Infinity", {}), ("1e999", {}), ("٥٧", {}), ("57 y", {}), ("40-49", {}), ("0x10", {}), ("1.2.3", {}), ("fifty", dict(missing=True)),
    ("5<6", dict(bounds=True)), ("57.5", dict(whole=True)), ("1e20", dict(whole=True)), ("9007199254740993", dict(whole=True)), ("999", dict(low=0, high=120)), ("-1", dict(low=0, high=120)), ("1 234", {}), ("TRUE", {})])
def test_other_numbers_are_refused_with_file_column_row_and_value(value, how):
    with pytest.raises(ValueError) as caught: numbers(column("57", value, "58", value), "age", "people.tsv", **how)
    assert str(caught.value).startswith(f"people.tsv, column 'age': row 3 {value!r}, row 5 {value!r}: a ")
    assert ("from 0 to 120" in str(caught.value)) == ("low" in how) and ("n/a where there is none" in str(caught.value)) == ("missing" in how)


def test_a_column_with_points_and_decimal_commas_is_refused():
    with pytest.raises(ValueError, match=r"row 3 '1\.234'"): numbers(column("57,5", "1.234"), "age", "people.tsv")
    assert numbers(column("57.5", "1.234"), "age", "people.tsv").tolist() == [57.5, 1.234]


def test_a_table_that_is_wrong_throughout_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"row 21 'x' and 80 more: a number is needed"): numbers(column(*100 * "x"), "age", "people.tsv")


def test_words_by_their_spellings():
    known = dict(R=("OD", "right eye"), L=("OS",))
    assert words(column("R", "od", " Right_Eye ", "RIGHT-EYE", "os", "l"), "age", "people.tsv", known).tolist() == list("RRRRLL")
    with pytest.raises(ValueError, match=r"people.tsv, column 'age': row 3 'OU', row 4 '': unknown, choose from 'R', 'L'"):
        words(column("R", "OU", "", "L"), "age", "people.tsv", known)
