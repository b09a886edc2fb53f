//! Messages as commands hold them, and the conversation that a template is given.

use engine::Conversation;
use serde_json::json;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// As templates know it.
    fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) role: Role,
    pub(crate) content: String,
}

impl Message {
    pub(crate) fn new(role: Role, content: impl Into<String>) -> Message {
        Message { role, content: content.into() }
    }
}

/// `messages`, to be answered. `now`: seconds since 1970, the same for all turns so that their beginnings stay the same.
pub(crate) fn conversation(messages: &[Message], now: i64) -> Conversation {
    let json = |message: &Message| json!({ "role": message.role.name(), "content": message.content });
    Conversation {
        messages: messages.iter().map(json).collect(),
        add_generation_prompt: true,
        now,
        ..Conversation::default()
    }
}
