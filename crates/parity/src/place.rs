//! Where a value stands in a run, and how it is written down: the step, the site, the buffer.

use std::fmt;

use model::{Buffer, Site, Stage};
use serde::{Deserialize, Serialize};

/// A buffer after a site of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "Written", try_from = "Written")]
pub struct Place {
    /// The step of the run, counted from 0.
    pub step: usize,
    /// The stage that had just run, and its layer.
    pub site: Site,
    /// What was looked at.
    pub buffer: Buffer,
}

impl Place {
    /// The name of the place within its step: `blk.6.experts_down.x`, `embed.x`. What a tensor of a trace is called.
    pub fn key(&self) -> String {
        key(self.site, self.buffer)
    }

    /// The place of a [`Place::key`].
    pub fn parse(step: usize, key: &str) -> Option<Place> {
        let (layer, rest) = match key.strip_prefix("blk.") {
            Some(rest) => {
                let (layer, rest) = rest.split_once('.')?;
                (Some(layer.parse().ok()?), rest)
            }
            None => (None, key),
        };
        let (stage, buffer) = rest.split_once('.')?;
        let site = Site { stage: Stage::named(stage)?, layer };
        Some(Place { step, site, buffer: Buffer::named(buffer)? })
    }
}

/// [`Place::key`] of a buffer after a site.
pub fn key(site: Site, buffer: Buffer) -> String {
    match site.layer {
        Some(layer) => format!("blk.{layer}.{}.{buffer}", site.stage),
        None => format!("{}.{buffer}", site.stage),
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}, {}, {}", self.step, self.site, self.buffer)
    }
}

/// A [`Place`] in JSON: `{"step":0,"layer":6,"stage":"experts_down","buffer":"x"}`; no layer for `embed` and `head`.
#[derive(Serialize, Deserialize)]
struct Written {
    step: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    stage: String,
    buffer: String,
}

impl From<Place> for Written {
    fn from(place: Place) -> Written {
        Written {
            step: place.step,
            layer: place.site.layer,
            stage: place.site.stage.name().into(),
            buffer: place.buffer.name().into(),
        }
    }
}

impl TryFrom<Written> for Place {
    type Error = String;

    fn try_from(written: Written) -> Result<Place, String> {
        let Written { step, layer, stage, buffer } = written;
        let unknown = |what: &str, name: &str| format!("unknown {what} `{}`", name.escape_debug());
        let site = Site { stage: Stage::named(&stage).ok_or_else(|| unknown("stage", &stage))?, layer };
        Ok(Place { step, site, buffer: Buffer::named(&buffer).ok_or_else(|| unknown("buffer", &buffer))? })
    }
}

/// A float in JSON that keeps its bits: `{"value":"NaN","bits":"0x7fc00000"}`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(into = "WrittenNumber", try_from = "WrittenNumber")]
pub struct Number(pub f32);

impl PartialEq for Number {
    /// By bits.
    fn eq(&self, other: &Number) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (0x{:08x})", Short(self.0), self.0.to_bits())
    }
}

/// A float in the shortest text that gives it back, with an exponent where it is far from 1.
struct Short(f32);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.0;
        let far = v != 0.0 && v.is_finite() && !(1e-4..1e7).contains(&v.abs());
        if far { write!(f, "{v:e}") } else { write!(f, "{v}") }
    }
}

#[derive(Serialize, Deserialize)]
struct WrittenNumber {
    value: String,
    bits: String,
}

impl From<Number> for WrittenNumber {
    fn from(number: Number) -> WrittenNumber {
        let bits = format!("0x{:08x}", number.0.to_bits());
        WrittenNumber { value: Short(number.0).to_string(), bits }
    }
}

impl TryFrom<WrittenNumber> for Number {
    type Error = String;

    fn try_from(written: WrittenNumber) -> Result<Number, String> {
        let digits = written.bits.strip_prefix("0x");
        let bits = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let wrong = || format!("`{}` are not the bits of a float", written.bits.escape_debug());
        bits.map(|bits| Number(f32::from_bits(bits))).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_both_ways() {
        for stage in Stage::ALL {
            let layer = (!matches!(stage, Stage::Embed | Stage::Head)).then_some(11);
            for buffer in Buffer::ALL {
                let place = Place { step: 3, site: Site { stage, layer }, buffer };
                assert_eq!(Place::parse(3, &place.key()), Some(place));
                let json = serde_json::to_string(&place).expect("names are text");
                assert_eq!(serde_json::from_str::<Place>(&json).expect("just written"), place, "{json}");
            }
        }
        for bad in ["", "embed", "blk.6", "blk.x.qkv.q", "blk.6.qkv.w", "blk.6.kqv.q"] {
            assert_eq!(Place::parse(0, bad), None, "{bad}");
        }
        let bad = serde_json::from_str::<Place>(r#"{"step":0,"stage":"kqv","buffer":"x"}"#);
        assert!(bad.is_err_and(|e| e.to_string().contains("unknown stage `kqv`")));
    }

    #[test]
    fn numbers_keep_their_bits() {
        for v in [0.0, -0.0, 1.5, f32::NAN, -f32::NAN, f32::INFINITY, f32::MIN_POSITIVE / 2.0, f32::MAX] {
            let json = serde_json::to_string(&Number(v)).expect("text");
            assert_eq!(serde_json::from_str::<Number>(&json).expect("just written"), Number(v), "{json}");
        }
        assert!(serde_json::from_str::<Number>(r#"{"value":"1","bits":"1.0"}"#).is_err());
    }
}
