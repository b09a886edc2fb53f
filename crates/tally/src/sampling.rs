//! The options that say how tokens are chosen, and where their defaults come from. Knows nothing of logits.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;

use engine::SamplerParams;
use gguf::Metadata;

use crate::failure::Failure;
use crate::load::Loaded;

/// What is used where neither the command line nor the file says anything: Qwen's recommendation for Qwen3 and
/// Qwen3-Coder, the architectures this engine runs.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.8;
const TOP_K: u32 = 20;

/// The seed where none is given: fixed, so that a command gives the same text each time.
const SEED: u64 = 0;

/// The arguments, to be flattened into a command's.
#[derive(clap::Args)]
#[command(
    next_help_heading = "Sampling (defaults: the file's general.sampling.* keys, else the numbers in parentheses)"
)]
pub(crate) struct Sampling {
    /// Always take the likeliest token: temperature 0.
    #[arg(long, conflicts_with = "temp")]
    greedy: bool,
    /// Flatten (above 1) or sharpen (below 1) the distribution, from 0 to 100 (0.7).
    #[arg(long, visible_alias = "temperature", value_name = "T", allow_negative_numbers = true,
          value_parser = number("from 0 to 100", |t| (0.0..=100.0).contains(&t)))]
    temp: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all (20).
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<u32>,
    /// Keep the likeliest tokens that together have probability P, above 0 and at most 1 (0.8).
    #[arg(long, value_name = "P", allow_negative_numbers = true,
          value_parser = number("above 0 and at most 1", |p| p > 0.0 && p <= 1.0))]
    top_p: Option<f32>,
    /// Keep tokens with at least P times the likeliest one's probability, at least 0 and below 1 (0).
    #[arg(long, value_name = "P", allow_negative_numbers = true,
          value_parser = number("at least 0 and below 1", |p| (0.0..1.0).contains(&p)))]
    min_p: Option<f32>,
    /// Divide positive and multiply negative logits of recent tokens, above 0 (1).
    #[arg(long, value_name = "X", allow_negative_numbers = true,
          value_parser = number("above 0 and finite", |x| x > 0.0 && x.is_finite()))]
    repeat_penalty: Option<f32>,
    /// How many recent tokens, the prompt's included, the three penalties look at (64).
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    repeat_last_n: Option<u32>,
    /// Subtract X from the logit of each recent token (0).
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = number("finite", f32::is_finite))]
    presence_penalty: Option<f32>,
    /// Subtract X from the logit of a recent token for each time that it is there (0).
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = number("finite", f32::is_finite))]
    frequency_penalty: Option<f32>,
    /// Add VALUE to the logit of token ID; may be repeated. `tally tokenize` shows ids.
    #[arg(long, value_name = "ID=VALUE", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Which of 2^64 sequences of random numbers to use, or `random` for any (0).
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<Seed>,
}

/// A parser of numbers in a range, which its error names.
fn number(range: &'static str, holds: fn(f32) -> bool) -> impl Fn(&str) -> Result<f32, String> + Clone {
    move |text| match text.parse() {
        Ok(number) if holds(number) => Ok(number),
        Ok(_) => Err(format!("it must be {range}")),
        Err(_) => Err(format!("not a number; it must be {range}")),
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let (id, value) = text.split_once('=').ok_or("write ID=VALUE, such as 42=-5")?;
    let id = id.parse().map_err(|_| format!("`{id}` is no token id"))?;
    Ok((id, number("finite", f32::is_finite)(value)?))
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Seed(u64);

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Seed, String> {
        if text == "random" {
            // The standard library's own source of randomness; 32 bits of it are easily typed again.
            return Ok(Seed(RandomState::new().hash_one(0) >> 32));
        }
        text.parse().map(Seed).map_err(|_| format!("it must be from 0 to {}, or `random`", u64::MAX))
    }
}

impl Sampling {
    /// The parameters for `loaded`: from the command line, else from the file, else the defaults above.
    ///
    /// Rows of the head beyond the vocabulary, padding, are never drawn.
    pub(crate) fn params(&self, loaded: &Loaded) -> Result<SamplerParams, Failure> {
        let file = FileDefaults::read(loaded.metadata()).map_err(|failure| failure.at(&loaded.name))?;
        let defaults = SamplerParams::default();
        let temperature = if self.greedy { Some(0.0) } else { self.temp };
        // A u32 fits: the crate runs on 64 bits, as the map of a model does.
        let window = self.repeat_last_n.or(file.penalty_window).map(|n| n as usize);
        Ok(SamplerParams {
            temperature: temperature.or(file.temperature).unwrap_or(TEMPERATURE),
            top_k: self.top_k.or(file.top_k).unwrap_or(TOP_K) as usize, // as above
            top_p: self.top_p.or(file.top_p).unwrap_or(TOP_P),
            min_p: self.min_p.or(file.min_p).unwrap_or(defaults.min_p),
            repeat_penalty: self.repeat_penalty.or(file.repeat_penalty).unwrap_or(defaults.repeat_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            penalty_window: window.unwrap_or(defaults.penalty_window),
            logit_bias: self.biases(loaded.tokenizer.ids_in_use())?,
            ids: loaded.tokenizer.ids_in_use(),
            seed: self.seed.map_or(SEED, |Seed(seed)| seed),
        })
    }

    fn biases(&self, tokens: u32) -> Result<BTreeMap<u32, f32>, Failure> {
        if let Some((id, _)) = self.logit_bias.iter().find(|&&(id, _)| id >= tokens) {
            let message = format!("--logit-bias: token id {id} is outside the vocabulary of {tokens} tokens");
            return Err(Failure::new(message).hint("`tally tokenize` shows the ids of a text"));
        }
        Ok(self.logit_bias.iter().copied().collect())
    }
}

/// The sampling parameters that a file recommends: the keys that llama.cpp's converters write, as far as the sampler
/// has such a parameter.
#[derive(Debug, Default, PartialEq)]
struct FileDefaults {
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    penalty_window: Option<u32>,
}

impl FileDefaults {
    fn read(metadata: &Metadata) -> Result<FileDefaults, Failure> {
        let float = |name: &str| metadata.opt_f32(&format!("general.sampling.{name}"));
        let count = |name: &str| metadata.opt_i64(&format!("general.sampling.{name}"));
        Ok(FileDefaults {
            temperature: float("temp")?,
            top_k: count("top_k")?.map(clamp),
            top_p: float("top_p")?,
            min_p: float("min_p")?,
            repeat_penalty: float("penalty_repeat")?,
            // -1 is llama.cpp's word for the whole context.
            penalty_window: count("penalty_last_n")?.map(|n| if n < 0 { u32::MAX } else { clamp(n) }),
        })
    }
}

/// A count as the sampler takes it; llama.cpp takes any number below 1 for "all", which is 0 here.
fn clamp(n: i64) -> u32 {
    u32::try_from(n.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recommendations_of_a_file() {
        let mut metadata = Metadata::new();
        assert_eq!(FileDefaults::read(&metadata).expect("no key is needed"), FileDefaults::default());
        metadata.set("general.sampling.temp", 0.6f32);
        metadata.set("general.sampling.top_k", -1i32);
        metadata.set("general.sampling.top_p", 0.95f64);
        metadata.set("general.sampling.penalty_last_n", -1i32);
        metadata.set("general.sampling.xtc_threshold", "not read");
        let want = FileDefaults {
            temperature: Some(0.6),
            top_k: Some(0),
            top_p: Some(0.95),
            penalty_window: Some(u32::MAX),
            ..FileDefaults::default()
        };
        assert_eq!(FileDefaults::read(&metadata).expect("well-typed"), want);
        metadata.set("general.sampling.min_p", "0.1");
        let failure = format!("{:?}", FileDefaults::read(&metadata).expect_err("a string"));
        assert!(failure.contains("general.sampling.min_p"), "{failure}");
    }

    #[test]
    fn seeds_and_biases() {
        assert_eq!("18446744073709551615".parse(), Ok(Seed(u64::MAX)));
        for wrong in ["18446744073709551616", "-1", "1.5", ""] {
            let error = wrong.parse::<Seed>().expect_err(wrong);
            assert!(error.contains("from 0 to 18446744073709551615"), "{wrong}: {error}");
        }
        let random = |_| "random".parse::<Seed>().expect("a word that is known").0;
        let drawn: Vec<u64> = (0..4).map(random).collect();
        assert!(
            drawn.iter().any(|&seed| seed != drawn[0]) && drawn.iter().all(|&seed| seed < 1 << 32),
            "{drawn:?}"
        );

        assert_eq!(bias("42=-5"), Ok((42, -5.0)));
        for wrong in ["42", "x=1", "42=inf", "42=", "-1=0"] {
            assert!(bias(wrong).is_err(), "{wrong}");
        }
    }
}
