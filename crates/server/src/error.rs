//! What clients are told when something is not done: one error, in the shape of each protocol. Knows no protocol's requests.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value as Json, json};

use crate::job::JobError;
use crate::worker::Unavailable;

/// An error as it goes to a client. One line, and what it is about.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// For programs: a word.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// The field of the request that is at fault.
    pub(crate) param: Option<String>,
    /// Seconds after which to try again.
    pub(crate) retry_after: Option<u64>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, code, message: message.into(), param: None, retry_after: None }
    }

    /// A request that cannot be done as it stands.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        ApiError { param: (!param.is_empty()).then(|| param.to_owned()), ..error }
    }

    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// With a time after which to try again.
    pub(crate) fn retry(self, seconds: u64) -> ApiError {
        ApiError { retry_after: Some(seconds), ..self }
    }

    /// OpenAI's word for this sort of error.
    fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// Anthropic's word for this sort of error.
    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The body that OpenAI's clients read.
    pub(crate) fn openai(&self) -> Json {
        json!({ "error": {
            "message": self.message, "type": self.openai_type(), "param": self.param, "code": self.code,
        } })
    }

    /// The body that Anthropic's clients read.
    pub(crate) fn anthropic(&self) -> Json {
        json!({ "type": "error", "error": { "type": self.anthropic_type(), "message": self.message } })
    }

    /// A response with this `body`.
    pub(crate) fn with(&self, body: &Json) -> Response {
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response();
        // Until the route is known, so is the shape.
        response.extensions_mut().insert(self.clone());
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.with(&self.openai())
    }
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> ApiError {
        let message = error.to_string();
        match error {
            JobError::NumericFault { .. } => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "numeric_fault", message)
            }
            JobError::TimedOut { .. } => ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message),
            JobError::Engine(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_fault", message),
            JobError::Stopping => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message).retry(5)
            }
            JobError::Choice(_) => ApiError::invalid("response_format", message),
        }
    }
}

impl From<Unavailable> for ApiError {
    fn from(why: Unavailable) -> ApiError {
        match why {
            Unavailable::Busy => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", "the queue is full").retry(1)
            }
            Unavailable::NotReady => ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "not_ready",
                "the server is loading or shutting down",
            )
            .retry(2),
            Unavailable::Dead => ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "engine_dead",
                "the engine has failed; see /health",
            ),
        }
    }
}
