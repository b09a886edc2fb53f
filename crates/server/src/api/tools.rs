//! The tools that a request offers, as OpenAI's protocols describe them, and whether they are to be called. Knows nothing of
//! how calls are written.

use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::conversation::ToolChoice;
use crate::error::ApiError;
use crate::text::Tool;

/// The fields of a request that speak of tools.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Offer {
    tools: Option<Vec<Offered>>,
    tool_choice: Option<Json>,
    parallel_tool_calls: Option<bool>,
}

/// A tool: chat completions describe its function in a field, responses beside the type.
#[derive(Debug, Deserialize)]
struct Offered {
    r#type: String,
    #[serde(default)]
    function: Option<Function>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Json>,
    #[serde(default)]
    strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Json>,
    #[serde(default)]
    strict: Option<bool>,
}

impl Offer {
    /// The tools.
    pub(super) fn tools(&self) -> Result<Vec<Tool>, ApiError> {
        let all = self.tools.iter().flatten().enumerate();
        all.map(|(i, offered)| offered.tool(&format!("tools[{i}]"))).collect()
    }

    /// OpenAI's `tool_choice`, a word or the name of a function.
    pub(super) fn choice(&self) -> Result<ToolChoice, ApiError> {
        let name = |choice: &Json| {
            let name = choice["function"]["name"].as_str().or(choice["name"].as_str())?;
            Some(name.to_owned())
        };
        match &self.tool_choice {
            None | Some(Json::Null) => Ok(ToolChoice::Auto),
            Some(Json::String(word)) => match word.as_str() {
                "auto" => Ok(ToolChoice::Auto),
                "none" => Ok(ToolChoice::None),
                "required" => Ok(ToolChoice::Required),
                other => {
                    Err(ApiError::invalid("tool_choice", format!("tool_choice: {other:?} is no choice")))
                }
            },
            Some(object) => match (object["type"].as_str(), name(object)) {
                (Some("function" | "tool"), Some(name)) => Ok(ToolChoice::Named(name)),
                _ => Err(ApiError::invalid("tool_choice", "tool_choice: it names no function")),
            },
        }
    }

    /// Whether there may be several calls in one answer.
    pub(super) fn parallel(&self) -> bool {
        self.parallel_tool_calls.unwrap_or(true)
    }
}

impl Offered {
    fn tool(&self, field: &str) -> Result<Tool, ApiError> {
        if self.r#type != "function" {
            let message = format!("{field}: tools of type {:?} are not known", self.r#type);
            return Err(ApiError::invalid(field, message));
        }
        match (&self.function, &self.name) {
            (Some(Function { name, description, parameters, strict }), _) => {
                tool(field, name.clone(), description.clone(), parameters.clone(), *strict)
            }
            (None, Some(name)) => {
                tool(field, name.clone(), self.description.clone(), self.parameters.clone(), self.strict)
            }
            (None, None) => Err(ApiError::invalid(field, format!("{field}: it describes no function"))),
        }
    }
}

/// A tool, its name checked: it goes into grammars and templates as it is.
pub(super) fn tool(
    field: &str,
    name: String,
    description: Option<String>,
    parameters: Option<Json>,
    strict: Option<bool>,
) -> Result<Tool, ApiError> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(of_name) {
        let message = format!("{field}: the name {name:?} is not of letters, digits, _, -, ., : and /");
        return Err(ApiError::invalid(field, message));
    }
    let parameters = match parameters {
        None | Some(Json::Null) => json!({ "type": "object", "properties": {} }),
        Some(schema @ Json::Object(_)) => schema,
        Some(_) => {
            return Err(ApiError::invalid(field, format!("{field}: the parameters of {name} are no schema")));
        }
    };
    Ok(Tool { name, description, parameters, strict: strict.unwrap_or(false) })
}
