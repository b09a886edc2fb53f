//! Tables of what models write, each cut at every place and into single characters: the same must come out.

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::text::Tool;

fn tools() -> Arc<Tools> {
    let tool = |name: &str, properties: Json| Tool {
        name: name.into(),
        description: None,
        parameters: json!({ "type": "object", "properties": properties }),
        strict: false,
    };
    Arc::new(Tools(vec![
        tool(
            "write",
            json!({ "path": { "type": "string" }, "text": { "type": "string" }, "mode": { "type": "integer" } }),
        ),
        tool("ping", json!({})),
        Tool { strict: true, ..tool("strict", json!({})) },
    ]))
}

/// What came out, with neighbours of a kind joined.
#[derive(Debug, Clone, PartialEq)]
enum Out {
    Think(String),
    Say(String),
    /// Name and arguments.
    Call(String, String),
}

fn joined(deltas: Vec<Delta>) -> Vec<Out> {
    let mut out: Vec<Out> = Vec::new();
    for delta in deltas {
        match (delta, out.last_mut()) {
            (Delta::Reasoning(more), Some(Out::Think(text)))
            | (Delta::Content(more), Some(Out::Say(text))) => {
                text.push_str(&more);
            }
            (Delta::Reasoning(text), _) => out.push(Out::Think(text)),
            (Delta::Content(text), _) => out.push(Out::Say(text)),
            (Delta::Call { name, .. }, _) => out.push(Out::Call(name, String::new())),
            (Delta::Arguments { json, .. }, Some(Out::Call(_, arguments))) => arguments.push_str(&json),
            (Delta::CallEnd { .. }, Some(Out::Call(..))) => {}
            (delta, last) => panic!("{delta:?} after {last:?}"),
        }
    }
    out
}

fn parse<'a>(syntax: &Syntax, pieces: impl IntoIterator<Item = &'a str>, cut: bool) -> Vec<Out> {
    let mut parser = Parser::new(syntax.clone());
    let mut deltas: Vec<Delta> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish(cut));
    joined(deltas)
}

#[track_caller]
fn check_with(syntax: &Syntax, text: &str, want: &[Out]) {
    assert_eq!(parse(syntax, [text], false), want, "{text}");
    let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    for &at in &boundaries {
        let (head, tail) = text.split_at(at);
        assert_eq!(parse(syntax, [head, tail], false), want, "{head}|{tail}");
    }
    let ends = boundaries.iter().skip(1).copied().chain([text.len()]);
    let singles = boundaries.iter().zip(ends).map(|(&from, to)| &text[from..to]);
    assert_eq!(parse(syntax, singles, false), want, "one by one: {text}");
}

#[track_caller]
fn check(text: &str, want: &[Out]) {
    check_with(&Syntax { reasoning: true, begins_in_reasoning: false, tools: tools() }, text, want);
}

fn say(text: &str) -> Out {
    Out::Say(text.into())
}

fn think(text: &str) -> Out {
    Out::Think(text.into())
}

fn call(name: &str, arguments: &str) -> Out {
    Out::Call(name.into(), arguments.into())
}

#[test]
fn reasoning() {
    check("<think>\nso\n</think>\n\nyes", &[think("so"), say("yes")]);
    check("\n<think>\n\n</think>\n\nyes\n", &[say("yes\n")]);
    check("no <think>at the start</think>", &[say("no <think>at the start</think>")]);
    check("<think>a < b, </thin", &[think("a < b, </thin")]);
    check("<thinking> aloud", &[say("<thinking> aloud")]);
    let begun = Syntax { reasoning: true, begins_in_reasoning: true, tools: tools() };
    check_with(&begun, "so\n</think>\nyes", &[think("so"), say("yes")]);
    check_with(&Syntax::default(), " <think>x</think>\n", &[say(" <think>x</think>\n")]);
}

#[test]
fn xml_calls() {
    let write = "<tool_call>\n<function=write>\n<parameter=path>\na.rs\n</parameter>\n<parameter=text>\nfn \"x\"() {\n}\n\n</parameter>\n<parameter=mode>\n420\n</parameter>\n</function>\n</tool_call>";
    let written = call("write", r#"{"path":"a.rs","text":"fn \"x\"() {\n}\n","mode":420}"#);
    check(write, std::slice::from_ref(&written));
    check(&format!("I will.\n\n{write}\n"), &[say("I will."), written.clone()]);
    check(&format!("{write}\n{write}"), &[written.clone(), written.clone()]);
    check(&format!("<think>\nhm\n{write}\n</think>\ndone"), &[think("hm"), written.clone(), say("done")]);
    check("<tool_call><function=ping></function></tool_call>", &[call("ping", "{}")]);
    check("<function=ping>\n</function>\nend", &[call("ping", "{}"), say("end")]);
    check("<function=strict></function>", &[say("<function=strict></function>")]);
    check("<tool_call><function=strict></function></tool_call>", &[call("strict", "{}")]);
    // Closed by nobody.
    check("<tool_call>\n<function=write>\n<parameter=path>\na", &[call("write", r#"{"path":"a"}"#)]);
    check(
        "<tool_call><function=write><parameter=path>a\n</function>\n</tool_call>!",
        &[call("write", r#"{"path":"a"}"#), say("!")],
    );
    check(
        "<tool_call><function=write><parameter=mode>x1</parameter></function>",
        &[call("write", r#"{"mode":"x1"}"#)],
    );
    check(
        "<tool_call><function=other><parameter=a>1</parameter></function></tool_call>",
        &[call("other", r#"{"a":"1"}"#)],
    );
}

#[test]
fn a_value_may_spell_any_tag() {
    let value = "a </parameter> b\n</tool_call> <parameter=x> </function> <tool_call> </think> é<";
    let text = format!(
        "<tool_call>\n<function=write>\n<parameter=text>\n{value}\n</parameter>\n</function>\n</tool_call>"
    );
    let arguments = json!({ "text": value }).to_string();
    check(&text, &[call("write", &arguments)]);
}

#[test]
fn json_calls() {
    check(
        "<tool_call>\n{\"name\": \"write\", \"arguments\": {\"text\": \"</tool_call> }\\\"\", \"n\": [1, {}]}}\n</tool_call>",
        &[call("write", "{\"text\": \"</tool_call> }\\\"\", \"n\": [1, {}]}")],
    );
    check(
        "x <tool_call>{\"arguments\": {}, \"name\": \"ping\"}</tool_call>\n",
        &[say("x"), call("ping", "{}")],
    );
    check("<tool_call>{\"name\": \"ping\"}</tool_call>y", &[call("ping", "{}"), say("y")]);
    check(
        "<tool_call>{\"name\":\"ping\",\"arguments\":\"{\\\"a\\\":1}\"}</tool_call>",
        &[call("ping", "{\"a\":1}")],
    );
    check(
        "<tool_call>{\"name\":\"ping\",\"arguments\":{}}</tool_call><tool_call>{\"name\":\"ping\",\"arguments\":{}}</tool_call>",
        &[call("ping", "{}"), call("ping", "{}")],
    );
    check("<think><tool_call>{\"name\":\"ping\",\"arguments\":{}}</tool_call>", &[call("ping", "{}")]);
}

/// What looks like a call and is none comes out whole.
#[test]
fn what_only_looks_like_a_tag() {
    for text in [
        "Write `<tool_call>` first.",
        "<tool_call> is a tag, {\"name\": 1}",
        "<tool_call>{\"name\": 3}</tool_call>",
        "<tool_call>[1]</tool_call>",
        "<tool_call>\n<function=>",
        "<function=unknown></function>",
        "a < b <tool a <tool_cal",
        "<tool_call>",
        "<tool_call>\n<fun",
        "<tool_call>{\"na",
        "</tool_call> and </function>",
        "if a<b { Vec::<u8>::new() }",
        " leading and trailing \n",
    ] {
        check(text, &[say(text)]);
    }
}

/// A call that the limit cut off is not completed: half a file is not a file.
#[test]
fn cut_calls_stay_incomplete() {
    let syntax = Syntax { tools: tools(), ..Syntax::default() };
    let cut = |text| parse(&syntax, [text], true);
    assert_eq!(
        cut("<tool_call>\n<function=write>\n<parameter=text>\nhalf a"),
        [call("write", r#"{"text":"half a"#)]
    );
    assert_eq!(
        cut("<tool_call>{\"name\":\"write\",\"arguments\":{\"text\":\"ha"),
        [call("write", "{\"text\":\"ha")]
    );
}

proptest! {
    /// Any text, in any pieces: the same comes out as in one, and nothing panics.
    #[test]
    fn pieces_do_not_matter(pieces in prop::collection::vec(
        "(<tool_call>|</tool_call>|<function=write>|</function>|<parameter=text>|</parameter>|</think>|<think>|\\{\"name\": \"ping\"|, \"arguments\": |\\{|\\}|\"|\n|<|a|é){0,3}", 0..12),
        begins_in_reasoning: bool) {
        let syntax = Syntax { reasoning: true, begins_in_reasoning, tools: tools() };
        let whole = pieces.concat();
        let want = parse(&syntax, [whole.as_str()], false);
        prop_assert_eq!(parse(&syntax, pieces.iter().map(String::as_str), false), want);
    }

    /// Without tools and reasoning the text is the text.
    #[test]
    fn plain_text_is_left_alone(pieces in prop::collection::vec("[<>/a \n]{0,5}|</think>|<tool_call>", 0..8)) {
        let whole = pieces.concat();
        let out = parse(&Syntax::default(), pieces.iter().map(String::as_str), false);
        let want: &[Out] = if whole.is_empty() { &[] } else { &[say(&whole)] };
        prop_assert_eq!(out, want);
    }
}
