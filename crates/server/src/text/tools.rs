//! The tools that a request offers, as far as their calls must be understood. Knows nothing of how a call is written.

use serde_json::Value as Json;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// The JSON schema of its arguments, an object.
    pub(crate) parameters: Json,
    /// Whether the arguments must satisfy the schema.
    pub(crate) strict: bool,
}

/// All tools of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Tools(pub(crate) Vec<Tool>);

/// How the text of an XML parameter becomes JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A string: what is written is its value.
    Text,
    /// Not a string: what is written is JSON.
    Json,
    /// JSON if it is valid, else a string.
    Either,
}

impl Tools {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What `parameter` of `tool` is; a string where nobody says.
    pub(super) fn kind(&self, tool: &str, parameter: &str) -> Kind {
        let Some(tool) = self.0.iter().find(|known| known.name == tool) else { return Kind::Text };
        kind(&tool.parameters["properties"][parameter])
    }
}

fn kind(schema: &Json) -> Kind {
    if let Some(values) = schema["enum"].as_array().filter(|_| schema["type"].is_null()) {
        return of(values.iter().map(|value| value.is_string()));
    }
    match &schema["type"] {
        Json::String(name) => of([name == "string"].into_iter()),
        Json::Array(names) => of(names.iter().map(|name| name == "string")),
        _ => match schema["anyOf"].as_array().or_else(|| schema["oneOf"].as_array()) {
            Some(schemas) => {
                let kinds: Vec<Kind> = schemas.iter().map(kind).collect();
                let all = |wanted| kinds.iter().all(|&kind| kind == wanted);
                if all(Kind::Text) {
                    Kind::Text
                } else if all(Kind::Json) {
                    Kind::Json
                } else {
                    Kind::Either
                }
            }
            None if schema.is_object() => Kind::Either,
            None => Kind::Text,
        },
    }
}

/// By whether each alternative is a string.
fn of(strings: impl Iterator<Item = bool>) -> Kind {
    let (mut some, mut all) = (false, true);
    for is_string in strings {
        some |= is_string;
        all &= is_string;
    }
    match (some, all) {
        (true, true) => Kind::Text,
        (true, false) => Kind::Either,
        (false, _) => Kind::Json,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kinds_of_parameters() {
        for (schema, want) in [
            (json!({ "type": "string" }), Kind::Text),
            (json!({ "type": "integer" }), Kind::Json),
            (json!({ "type": ["string", "null"] }), Kind::Either),
            (json!({ "type": ["number", "null"] }), Kind::Json),
            (json!({ "enum": ["a", "b"] }), Kind::Text),
            (json!({ "enum": ["a", 1] }), Kind::Either),
            (json!({ "enum": [1, 2] }), Kind::Json),
            (json!({ "type": "string", "enum": ["a"] }), Kind::Text),
            (json!({ "anyOf": [{ "type": "string" }, { "enum": ["x"] }] }), Kind::Text),
            (json!({ "anyOf": [{ "type": "string" }, { "type": "null" }] }), Kind::Either),
            (json!({ "oneOf": [{ "type": "array" }, { "type": "null" }] }), Kind::Json),
            (json!({ "description": "anything" }), Kind::Either),
            (Json::Null, Kind::Text),
        ] {
            assert_eq!(kind(&schema), want, "{schema}");
        }
    }
}
