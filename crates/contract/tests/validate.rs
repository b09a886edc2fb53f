//! Contracts that are none, and where they are not.

mod bench;

use bench::{CONTRACT, SPECS, source};
use contract::{Finding, read, schema, validate};

/// The findings of `CONTRACT` with `from` replaced by `to`, as text.
#[track_caller]
fn findings(from: &str, to: &str) -> Vec<String> {
    assert!(CONTRACT.contains(from), "{from:?} is not in the contract");
    let text = CONTRACT.replacen(from, to, 1);
    match read("thing-v1.yaml", &text) {
        Ok(source) => validate(&[source], &SPECS).iter().map(Finding::to_string).collect(),
        Err(finding) => vec![finding.to_string()],
    }
}

/// What the contract says of itself as it stands.
const PROPOSAL: &str = "warning: `F-LATER` has no check: no more than a proposal";

#[test]
fn structure_has_a_line_and_a_column() {
    let check = |from: &str, to: &str, want: &str| assert_eq!(findings(from, to), [want], "{to:?}");
    check(
        "governs: A thing.",
        "governs: A thing.\nstatus: discharged",
        "thing-v1.yaml:4:1: error: a status is computed from evidence (`tally contract status`): nobody types one",
    );
    check(
        "    prediction: It will be.\n",
        "    status: proposed\n    prediction: It will be.\n",
        "thing-v1.yaml:28:5: error: a status is computed from evidence (`tally contract status`): nobody types one",
    );
    let one = |from: &str, to: &str, at: &str, said: &str| {
        let found = findings(from, to);
        let [line] = &found[..] else { panic!("{to:?}: {found:?}") };
        assert!(line.starts_with(&format!("thing-v1.yaml:{at}: error: ")) && line.contains(said), "{line}");
    };
    one("governs: A thing.", "governs: [a, b]", "3:10", "string");
    one("version: 2", "version: two", "2:10", "invalid u32");
    one(
        "governs: A thing.",
        "goverms: A thing.",
        "3:1",
        "unknown field `goverms`, expected one of id, version",
    );
    one("    formula: a = b\n", "", "10:5", "missing field `formula`");
    one(
        "    formula: a = b\n",
        "    formula: a = b\n    formula: b = a\n",
        "12:5",
        "duplicate mapping key `formula`",
    );
    one(
        "      parameters: { tokens: 3 }",
        "      parameters: { tokens: 3",
        "18:12",
        "did not find expected ',' or '}'",
    );
    one("id: thing-v1", "id: thing-v1\n\tversion: 1", "1:5", "found a tab");
}

#[test]
fn names_mean_something() {
    let check = |from: &str, to: &str, at: &str, said: &str| {
        let mut found = findings(from, to);
        found.retain(|line| !line.ends_with(PROPOSAL));
        let [line] = &found[..] else { panic!("{to:?}: {found:#?}") };
        assert!(line.starts_with(&format!("thing-v1.yaml:{at}: ")) && line.contains(said), "{line}");
    };
    assert_eq!(findings("id", "id"), [format!("thing-v1.yaml:26:9: {PROPOSAL}")]);
    check(
        "name: finite",
        "name: finitude",
        "16:13",
        "error: unknown check `finitude`; known are finite, equal, table",
    );
    check(
        "{ tokens: 3 }",
        "{ tokens: 3, tokes: 4 }",
        "17:39",
        "error: check `finite` has no parameter `tokes`",
    );
    check(
        "{ tokens: 3 }",
        "{ tokens: few }",
        "17:29",
        "error: `tokens` of check `finite` is a count, not few",
    );
    check("{ tokens: 3 }", "{}", "16:13", "error: check `finite` needs the parameter `tokens`");
    check("fault: nan", "fault: inf", "18:14", "error: check `finite` has no fault `inf`; it has nan");
    check("      fault: nan\n", "", "16:13", "warning: no fault is planted");
    check(
        "refutes: [finite]",
        "refutes: [finite, infinite]",
        "14:23",
        "error: there is no invariant `infinite`",
    );
    check("[F-FINITE, F-EQUAL", "[F-FINITE, F-EGAL", "36:26", "error: there is no falsifier `F-EGAL` here");
    let twice = "- id: F-FINITE\n    refutes: [equal]\n    check: { name: finite, parameters: { tokens: 1 }, fault: nan }\n    prediction: x\n    if_it_fails: x\n  - id: F-EQUAL";
    check("- id: F-EQUAL", twice, "21:9", "error: falsifier `F-FINITE` is in thing-v1.yaml already");
    check(
        "- id: equal",
        "- id: equal\n    words: x\n    formula: x\n  - id: equal",
        "12:9",
        "error: invariant `equal` is there twice",
    );
    check("prediction: They are equal.", "prediction: ' '", "24:17", "error: `prediction` is empty");
    check(
        "version: 2\ngov",
        "version: 3\ngov",
        "2:10",
        "error: version 3 of a contract whose amendments lead to 2",
    );
    check(
        "  - id: equal",
        "  - id: other\n    words: x\n    formula: x\n  - id: equal",
        "9:9",
        "warning: no falsifier would refute the invariant `other`",
    );
    check("id: thing-v1", "id: thing-v2", "1:5", "error: `thing-v2` is in a file called `thing-v1`");
}

#[test]
fn a_falsifier_belongs_to_one_contract() {
    let (one, mut other) = (source(CONTRACT), source(CONTRACT));
    other.file = "other.yaml".into();
    let found: Vec<_> = validate(&[one, other], &SPECS).iter().map(Finding::to_string).collect();
    assert!(
        found
            .iter()
            .any(|line| line == "other.yaml:13:9: error: falsifier `F-FINITE` is in thing-v1.yaml already"),
        "{found:#?}"
    );
}

#[test]
fn the_schema_says_what_reading_demands() {
    let schema = schema();
    assert_eq!(schema["additionalProperties"], false);
    let required: Vec<_> =
        schema["required"].as_array().expect("a list").iter().filter_map(|name| name.as_str()).collect();
    assert_eq!(required, ["id", "version", "governs", "invariants", "falsifiers"]);
    assert!(schema["properties"].get("status").is_none());
}
