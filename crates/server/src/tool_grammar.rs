//! Calls of tools as a grammar in Lark: what a model must write when it has to call, in the form that it was trained on.
//! Knows schemas and the two forms; not when a call is demanded.

use std::fmt::Write as _;

use llguidance::regex_to_lark;
use serde_json::{Value as Json, json};

use crate::grammar::{Grammar, spaced};
use crate::service::CallForm;
use crate::text::Tool;

/// What the whole text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    /// One call.
    Call,
    /// One call, or several.
    Calls,
    /// What is left of a call when its opening tag was written.
    RestOfCall,
}

/// The grammar of calls of `tools`; where `or` is given, the text may satisfy that in place of a call.
pub(crate) fn calls(tools: &[&Tool], form: CallForm, whole: Whole, or: Option<&Grammar>) -> String {
    let mut lark = String::from("%llguidance {}\n");
    let calls = match whole {
        Whole::Call => "call",
        Whole::Calls => "call (SPACE call)*",
        Whole::RestOfCall => "rest",
    };
    let or = match or {
        Some(answer) => {
            let _ = match answer {
                Grammar::Schema(schema) => writeln!(lark, "answer: %json {}", spaced(schema)),
                Grammar::Regex(regex) => writeln!(lark, "answer: /{}/", regex_to_lark(regex, "")),
                Grammar::Lark(other) => writeln!(lark, "answer: %lark {{\n{other}\n}}"),
            };
            " | answer"
        }
        None => "",
    };
    // A string takes everything that is written to it.
    let _ = writeln!(lark, "start: {calls}{or}\nSPACE: /[ \\n]{{0,4}}/\ncall: \"<tool_call>\" rest");
    let names: Vec<String> = (0..tools.len()).map(|i| format!("rest_{i}")).collect();
    let _ = writeln!(lark, "rest: {}", names.join(" | "));
    for (i, tool) in tools.iter().enumerate() {
        match form {
            CallForm::Json => json_call(i, tool, &mut lark),
            CallForm::Xml => xml_call(i, tool, &mut lark),
        }
    }
    lark
}

/// `text` as a string of Lark, which are JSON's.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

/// The schema of a tool's arguments: an object, whatever is missing.
fn parameters(tool: &Tool) -> Json {
    match &tool.parameters {
        Json::Object(fields) if !fields.is_empty() => Json::Object(fields.clone()),
        _ => json!({ "type": "object" }),
    }
}

fn json_call(i: usize, tool: &Tool, lark: &mut String) {
    let mut arguments = parameters(tool);
    let mut schema = json!({
        "type": "object",
        "properties": { "name": { "const": tool.name } },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    });
    // References are from the root.
    for definitions in ["$defs", "definitions"] {
        if let Some(moved) = arguments.as_object_mut().and_then(|fields| fields.remove(definitions)) {
            schema[definitions] = moved;
        }
    }
    schema["properties"]["arguments"] = arguments;
    let _ = writeln!(
        lark,
        "rest_{i}: \"\\n\" object_{i} \"\\n</tool_call>\"\nobject_{i}: %json {}",
        spaced(&schema)
    );
}

fn xml_call(i: usize, tool: &Tool, lark: &mut String) {
    let schema = parameters(tool);
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    let properties = schema["properties"].as_object().cloned().unwrap_or_default();
    let mut rules = String::new();
    let mut parts = String::new();
    for (j, (name, property)) in properties.iter().enumerate() {
        let optional = if required.contains(&name.as_str()) { "" } else { "?" };
        let _ = write!(parts, " parameter_{i}_{j}{optional}");
        let _ =
            writeln!(rules, "parameter_{i}_{j}: {} value_{i}_{j}", quoted(&format!("<parameter={name}>\n")));
        let _ = writeln!(rules, "{}", value(i, j, property, &schema));
    }
    let open = quoted(&format!("\n<function={}>\n", tool.name));
    let _ = writeln!(lark, "rest_{i}: {open}{parts} \"</function>\\n</tool_call>\"\n{rules}");
}

/// The value of a parameter, its closing tag included.
fn value(i: usize, j: usize, property: &Json, schema: &Json) -> String {
    /// A length beyond this is not held to: the automaton would have as many states.
    const LONGEST: u64 = 1000;
    const CLOSE: &str = "\"\\n</parameter>\\n\"";
    let strings: Option<Vec<String>> = property["enum"]
        .as_array()
        .and_then(|values| values.iter().map(|value| value.as_str().map(quoted)).collect());
    match strings {
        Some(strings) if !strings.is_empty() => format!("value_{i}_{j}: ({}) {CLOSE}", strings.join(" | ")),
        _ if property["type"] == "string" => {
            let bound = |name: &str| property[name].as_u64().filter(|&length| length <= LONGEST);
            let least = bound("minLength").unwrap_or(0);
            let most = bound("maxLength").map_or(String::new(), |most| most.max(least).to_string());
            format!("value_{i}_{j}[suffix={CLOSE}]: /(?s:.{{{least},{most}}})/")
        }
        _ => {
            let mut property = property.clone();
            for definitions in ["$defs", "definitions"] {
                if property.is_object() && !schema[definitions].is_null() {
                    property[definitions] = schema[definitions].clone();
                }
            }
            format!("value_{i}_{j}: json_{i}_{j} {CLOSE}\njson_{i}_{j}: %json {}", spaced(&property))
        }
    }
}
