//! `cargo xtask rig`: throw-away real servers for tests.
//!
//! A rig is a folder `rigs/<name>` with a `rig.toml` that says how its server is had, run and
//! reached. What is had stays in one cache folder outside the tree; what runs has its own data
//! directory and a random port on loopback, and leaves nothing when it is taken down.

mod describe;
mod obtain;
mod serve;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use describe::Rig;

/// What to do with rigs.
#[derive(Debug, clap::Subcommand)]
pub enum RigCommand {
    /// Gets, if need be, and starts rigs, and prints how to reach them.
    Up {
        /// Which: the folders of `rigs/`.
        #[arg(required = true)]
        names: Vec<String>,
        /// Print one JSON object instead of shell exports.
        #[arg(long)]
        json: bool,
    },
    /// Stops rigs and removes their data.
    Down {
        /// Which; all that run if none is named.
        names: Vec<String>,
    },
    /// Lists what there is, and what runs.
    List,
}

/// Carries the command out.
pub fn run(root: &Path, command: &RigCommand) -> Result<(), String> {
    let cache = cache()?;
    match command {
        RigCommand::Up { names, json } => {
            let mut given = BTreeMap::new();
            for name in names {
                let rig = Rig::load(root, name)?;
                obtain::obtain(&rig, &cache, false)?;
                given.extend(serve::up(&rig, &cache, &serve::folder(&cache, name))?);
            }
            print_given(&given, *json)
        }
        RigCommand::Down { names } => {
            let names = if names.is_empty() { serve::running(&cache) } else { names.clone() };
            names.iter().try_for_each(|name| serve::down(&serve::folder(&cache, name)))
        }
        RigCommand::List => {
            let running = serve::running(&cache);
            for name in Rig::names(root)? {
                let rig = Rig::load(root, &name)?;
                let state = if running.contains(&name) { "running" } else { "" };
                println!("{name:<10} {:<60} {state}", rig.about);
            }
            Ok(())
        }
    }
}

/// Gets the rig's server without starting it; `gently` leaves the processor to others.
pub fn obtain(rig: &Rig, gently: bool) -> Result<(), String> {
    obtain::obtain(rig, &cache()?, gently)
}

/// The path of the rig's program, once it was got.
pub fn program(rig: &Rig) -> Result<PathBuf, String> {
    Ok(rig.program(&cache()?))
}

/// Starts the rig and returns the environment by which tests reach it, and whether it ran before.
pub fn up(rig: &Rig) -> Result<(BTreeMap<String, String>, bool), String> {
    let cache = cache()?;
    let before = serve::running(&cache).contains(&rig.name);
    Ok((serve::up(rig, &cache, &serve::folder(&cache, &rig.name))?, before))
}

/// Stops the rig and removes its data; no error if it does not run.
pub fn down(name: &str) -> Result<(), String> {
    serve::down(&serve::folder(&cache()?, name))
}

/// Starts a server of the rig beside the one for tests, with all its state in `folder`.
pub fn up_in(rig: &Rig, folder: &Path) -> Result<BTreeMap<String, String>, String> {
    serve::up(rig, &cache()?, folder)
}

/// Stops what [`up_in`] started, and removes its folder.
pub fn down_in(folder: &Path) -> Result<(), String> {
    serve::down(folder)
}

fn cache() -> Result<PathBuf, String> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let cache = base.ok_or("neither XDG_CACHE_HOME nor HOME is set")?.join("stillpoint-rigs");
    std::fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    Ok(cache)
}

fn print_given(given: &BTreeMap<String, String>, json: bool) -> Result<(), String> {
    if json {
        println!("{}", serde_json::to_string_pretty(given).map_err(|error| error.to_string())?);
    } else {
        given.iter().for_each(|(name, value)| println!("export {name}='{value}'"));
    }
    Ok(())
}
