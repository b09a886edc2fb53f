//! The protocols: each turns its requests into what the service understands, and pieces of answers into its own events and
//! objects. None knows the engine.

pub(crate) mod chat;
pub(crate) mod completions;
mod finished;
pub(crate) mod messages;
pub(crate) mod params;
pub(crate) mod plain;
pub(crate) mod responses;
mod tools;

use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::error::ApiError;

/// A request's body as `T`; what is wrong with it is told by the field.
pub(crate) fn read<T: DeserializeOwned>(body: &Json) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "" } else { &path };
        let message = error.inner().to_string();
        ApiError::invalid(path, if path.is_empty() { message } else { format!("{path}: {message}") })
    })
}

/// A random id such as `chatcmpl-9f2c...`.
pub(crate) fn id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", random(), random() as u32) // the low half
}

/// 64 random bits: the standard library's own source of them.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
