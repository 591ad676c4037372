//! Where the programs come from that the example platform is made of.

use std::path::{Path, PathBuf};

use stillpoint_testkit::platform::Programs;

use crate::rig::{self, Rig};

/// Gets the servers as their rigs say, and ours from `folder`; without one they are built, `release` or
/// as tests are.
pub fn get(root: &Path, folder: Option<&Path>, release: bool) -> Result<Programs, String> {
    let server = |name: &str| {
        let rig = Rig::load(root, name)?;
        rig::obtain(&rig, false)?;
        rig::program(&rig)
    };
    let postgres = server("postgres")?;
    let folder = match folder {
        Some(folder) => std::path::absolute(folder).map_err(|error| format!("{}: {error}", folder.display()))?,
        None => build(root, release)?,
    };
    Ok(Programs {
        postgres_bin: postgres.parent().map(Path::to_owned).ok_or("postgres lies in no folder")?,
        redis_server: server("redis")?,
        minio: server("s3")?,
        stillpoint: folder.join("stillpoint"),
        registry: folder.join("model-registry"),
    })
}

/// Builds our two programs and returns the folder that holds them.
fn build(root: &Path, release: bool) -> Result<PathBuf, String> {
    let metadata = cargo_metadata::MetadataCommand::new().manifest_path(root.join("Cargo.toml")).no_deps().exec();
    let target = metadata.map_err(|error| format!("cargo metadata: {error}"))?.target_directory;
    let mut command = crate::test::cargo(root);
    command.args(["build", "--quiet", "--package", "stillpoint", "--package", "model-registry"]);
    if release {
        command.arg("--release");
    }
    let status = command.status().map_err(|error| format!("cargo cannot be run: {error}"))?;
    if !status.success() {
        return Err("the programs do not build".to_owned());
    }
    Ok(target.into_std_path_buf().join(if release { "release" } else { "debug" }))
}
