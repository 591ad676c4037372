//! Where a restore goes, and what of a point: options that `plan` and `restore` share.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::{EnvironmentName, StoreName};
use stillpoint_engine::config::Config;
use stillpoint_engine::ops::destination::Destination;
use stillpoint_engine::ops::plan::PlanRequest;

/// The folder that is restored into when nothing else is said.
const FOLDER_DEFAULT: &str = "restored";

/// Options of `plan` and `restore`.
#[derive(Debug, Args)]
pub struct Options {
    /// A point's id, the first characters of it, or `latest`.
    #[arg(default_value = "latest")]
    point: String,
    /// Into this environment, as `targets` in platform.yaml describes it.
    #[arg(long, value_name = "ENVIRONMENT", conflicts_with_all = ["to", "in_place"])]
    into: Option<String>,
    /// Into this folder, each store in a folder of its name. Default: ./restored, or the only
    /// environment under `targets`.
    #[arg(long, value_name = "FOLDER", conflicts_with = "in_place")]
    to: Option<PathBuf>,
    /// Over the stores of platform.yaml themselves; what was there is kept beside.
    #[arg(long)]
    in_place: bool,
    /// The identity of a store that --in-place replaces, typed to confirm it; once per store.
    #[arg(long, value_name = "IDENTITY", requires = "in_place")]
    confirm: Vec<String>,
    /// Only this store; may be given several times.
    #[arg(long = "store", value_name = "STORE")]
    stores: Vec<String>,
    /// Only this part of a store: a path or a key prefix.
    #[arg(long = "part", value_name = "STORE:PATH")]
    parts: Vec<String>,
    /// Overwrite what an earlier restore into the same environment left.
    #[arg(long)]
    replace: bool,
    /// Accept that stores of different points stand side by side afterwards.
    #[arg(long)]
    accept_mixed: bool,
    /// Do not read back what was written. Every byte is authenticated and hashed as it comes from the
    /// bucket all the same; the result is then called restored, not proven.
    #[arg(long)]
    no_compare: bool,
}

impl Options {
    /// What these options ask for.
    pub fn request(&self, config: &Config) -> Result<PlanRequest> {
        let parts = self.parts.iter().map(|text| part(text)).collect::<Result<BTreeMap<_, _>>>()?;
        let mut stores = self.stores.iter().map(|name| StoreName::new(name.as_str())).collect::<Result<Vec<_>>>()?;
        // A part of a store means that store; the others only if they are named too.
        stores.extend(parts.keys().cloned());
        stores.sort();
        stores.dedup();
        Ok(PlanRequest {
            stores,
            parts,
            replace: self.replace,
            accept_mixed: self.accept_mixed,
            compare: !self.no_compare,
            ..PlanRequest::new(self.point.as_str(), self.destination(config)?)
        })
    }

    fn destination(&self, config: &Config) -> Result<Destination> {
        if self.in_place {
            return Ok(Destination::InPlace { typed: self.confirm.clone() });
        }
        if let Some(environment) = &self.into {
            return Ok(Destination::Environment(EnvironmentName::new(environment.as_str())?));
        }
        if let Some(folder) = &self.to {
            return Destination::folder(folder);
        }
        let mut targets = config.platform.targets.keys();
        match (targets.next(), targets.next()) {
            (Some(only), None) => Ok(Destination::Environment(only.clone())),
            _ => Destination::folder(FOLDER_DEFAULT),
        }
    }

    /// Whether it changes what is there, so that a person should be asked.
    pub fn overwrites(&self) -> bool {
        self.in_place || self.replace
    }
}

fn part(text: &str) -> Result<(StoreName, String)> {
    let (store, path) = text.split_once(':').ok_or_else(|| {
        Error::new(Kind::Config, format!("`{text}` does not name a part of a store"))
            .hint("write STORE:PATH, for example --part artifacts:models/17")
    })?;
    Ok((StoreName::new(store)?, path.to_owned()))
}
