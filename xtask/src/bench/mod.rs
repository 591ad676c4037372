//! `cargo xtask bench WHAT`: speed and memory of whole processes, beside real peers in the same run.
//!
//! Rounds are interleaved: every tool does a step before the next step begins, so that a machine
//! whose speed drifts treats all alike. Medians are quoted, with the ratio ours / peer. Nothing
//! here fails because something was slow: goals are stated, a person reads them.

mod files;
mod measure;
mod pause;
mod postgres;
mod redis;
mod s3;
mod server;
mod table;
mod tools;

use std::path::{Path, PathBuf};

/// What to run.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Which bench.
    #[arg(value_parser = ["files", "postgres", "redis", "s3", "pause"])]
    pub what: String,
    /// Also write the rows to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Where the input and the repositories go; a memory-backed directory.
    #[arg(long, default_value = "/dev/shm/stillpoint-bench")]
    pub dir: PathBuf,
    /// Rounds; medians are over these.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Share of the full input, 1.0 = 2 GB, or 100,000 objects. Smaller ones are for trying the bench itself.
    #[arg(long, default_value_t = 1.0)]
    pub scale: f64,
    /// Only these cases, by name; default all but `s3` and `million`, which must be asked for.
    #[arg(long, value_delimiter = ',')]
    pub cases: Vec<String>,
    /// `pause`: how many cuts at each size.
    #[arg(long, default_value_t = 100)]
    pub cuts: usize,
    /// `pause`: 20 cuts at 100 MB and 1 GB; `s3`: 2,000 objects: for trying the bench itself.
    #[arg(long)]
    pub small: bool,
    /// `pause`: take `stillpoint` and `model-registry` from this folder, and build nothing.
    #[arg(long, value_name = "FOLDER")]
    pub programs: Option<PathBuf>,
    /// `pause`: programs as tests are built, instead of released ones.
    #[arg(long)]
    pub dev: bool,
    /// Only these peers; default all that are found.
    #[arg(long, value_delimiter = ',')]
    pub peers: Vec<String>,
}

/// Runs the bench and prints its table.
pub fn run(root: &Path, args: &BenchArgs) -> Result<(), String> {
    let rows = match args.what.as_str() {
        "postgres" => postgres::run(root, args)?,
        "redis" => redis::run(root, args)?,
        "s3" => s3::run(root, args)?,
        "pause" => pause::run(root, args)?,
        _ => files::run(root, args)?,
    };
    println!("{}", table::render(&rows));
    if let Some(path) = &args.json {
        table::write_json(path, &rows)?;
    }
    Ok(())
}
