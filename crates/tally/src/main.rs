//! The command line: parses, hands over to one file a command, and turns a failure into one readable line.

mod activations;
mod answer;
mod capture;
mod clock;
mod commands;
mod compared;
mod device;
mod failure;
mod figures;
mod input;
mod interrupt;
mod live;
mod load;
mod machine;
mod message;
mod mix_argument;
mod model_file;
mod output;
mod progress;
mod prompt_args;
mod prompted;
mod sampling;
mod source;
mod table;
mod text_out;
mod threads;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands::*;

/// An inference engine for GGUF models whose CPU and GPU runs give the same bits.
///
/// Start with `tally run -p "fn main() {"`: without a model it runs the small one that ships in the binary.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text from a prompt.
    Run(run::Args),
    /// Talk to a model.
    Chat(chat::Args),
    /// Show what is in a model file: metadata, tensors, and which type each tensor has in which layer.
    Inspect(inspect::Args),
    /// Serve a model over HTTP: OpenAI's and Anthropic's protocols, and a page.
    Serve(serve::Args),
    /// Measure prompt and generation speed, beside the device's memory bandwidth.
    Bench(bench::Args),
    /// Measure how well a model predicts a text, and how far two runs are apart.
    Perplexity(perplexity::Args),
    /// Run a prompt on two devices and hold their logits against each other, bit for bit.
    Parity(parity::Args),
    /// Check contracts, execute their falsifiers, and say what is known of them.
    Contract(contract::Args),
    /// Draw what a bisection or a trace found: a table here, and a page for a browser.
    Report(report::Args),
    /// Write down what every stage of a run computed.
    Trace(trace::Args),
    /// Find where two runs part, say why, and cut out what shows it.
    Bisect(bisect::Args),
    /// Run the stage that a bisection cut out, alone.
    Replay(replay::Args),
    /// Plant every fault that the debugger is tested with, and print what it names.
    Faults(faults::Args),
    /// Compile a model's GPU kernels ahead of its first run.
    Prewarm(prewarm::Args),
    /// Write a model in another tensor type.
    Quantize(quantize::Args),
    /// Write a model of random weights in a named shape.
    Synth(synth::Args),
    /// Turn text into token ids.
    Tokenize(tokenize::Args),
    /// Turn token ids into text.
    Detokenize(detokenize::Args),
    /// Print a completion script for a shell.
    Completions(completions::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Where the system grants neither, Ctrl-C and a file cut short end the process all the same, less tidily.
    let _ = interrupt::install();
    let _ = gguf::exit_on_shrink();
    let result = match cli.command {
        Command::Run(args) => args.run(),
        Command::Chat(args) => args.run(),
        Command::Serve(args) => args.run(),
        Command::Inspect(args) => args.run(),
        Command::Bench(args) => args.run(),
        Command::Perplexity(args) => args.run(),
        Command::Parity(args) => args.run(),
        Command::Contract(args) => args.run(),
        Command::Report(args) => args.run(),
        Command::Trace(args) => args.run(),
        Command::Bisect(args) => args.run(),
        Command::Replay(args) => args.run(),
        Command::Faults(args) => args.run(),
        Command::Prewarm(args) => args.run(),
        Command::Quantize(args) => args.run(),
        Command::Synth(args) => args.run(),
        Command::Tokenize(args) => args.run(),
        Command::Detokenize(args) => args.run(),
        Command::Completions(args) => args.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
