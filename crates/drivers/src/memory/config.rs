//! Settings of the `memory` driver. Pure: nothing here touches a store.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};

/// What stands under the store in `platform.yaml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// The store's name within this process.
    pub name: String,
}

impl Settings {
    /// Refuses what no store can be called. After it, the settings cannot fail.
    pub fn validate(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::new(Kind::Config, "`name` is empty").hint("name: any text"));
        }
        Ok(())
    }
}
