//! What is told without the engine: models, health, metrics, load, version, the OpenAPI document.

use std::sync::Arc;

use axum::Json as JsonBody;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value as Json, json};

use crate::error::ApiError;
use crate::service::Service;

/// The OpenAPI document, kept by hand; a test holds it against the routes.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// `GET /health`.
pub(crate) fn health(service: &Service) -> Response {
    let (status, body) = service.health();
    (status, JsonBody(body)).into_response()
}

/// `GET /metrics`.
pub(crate) fn metrics(service: &Service) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], service.engine.shared().metrics.text()).into_response()
}

/// `GET /load`: the numbers that the page draws.
pub(crate) fn load(service: &Service) -> Response {
    let mut body = service.engine.shared().metrics.snapshot();
    body["waiting"] = service.engine.shared().waiting().into();
    body["most_running"] = service.options.engine.running.into();
    body["most_waiting"] = service.options.engine.waiting.into();
    body["status"] = service.health().1["status"].take();
    JsonBody(body).into_response()
}

/// `GET /version`.
pub(crate) fn version(service: &Service) -> Response {
    let mut body = json!({ "name": "tally", "version": env!("CARGO_PKG_VERSION"), "model": service.name });
    if let (Json::Object(body), Json::Object(facts)) = (&mut body, &service.facts) {
        body.extend(facts.clone());
    }
    JsonBody(body).into_response()
}

/// `GET /openapi.json`.
pub(crate) fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

fn model(service: &Service) -> Json {
    json!({
        "id": service.name, "object": "model", "created": service.created, "owned_by": "tally",
        // Anthropic's fields.
        "type": "model", "display_name": service.name,
        "max_model_len": service.engine.shared().context(),
    })
}

/// `GET /v1/models`.
pub(crate) fn models(service: &Arc<Service>) -> Response {
    let body = json!({
        "object": "list", "data": [model(service)],
        "has_more": false, "first_id": service.name, "last_id": service.name,
    });
    JsonBody(body).into_response()
}

/// `GET /v1/models/{model}`.
pub(crate) fn one_model(service: &Service, name: &str) -> Result<Response, ApiError> {
    if name == service.name {
        return Ok(JsonBody(model(service)).into_response());
    }
    let message = format!("there is no model {name:?}; this server has {:?}", service.name);
    Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message))
}
